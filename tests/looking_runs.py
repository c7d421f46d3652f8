"""Run folders as trainings leave them, written by the writers that trainings write with, in milliseconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ghostmask.engine.metrics import Counts, MetricWriter
from ghostmask.engine.world import single
from ghostmask.launcher.record import new_record, write_record
from ghostmask.launcher.settings import flat, load_config, to_yaml

EPOCHS, STEPS = 6, 50


def make_run(
    folder: Path, *, layers: int = 5, finished: bool = True, restarts: int = 1, decided: float = 0.95,
    overrides: tuple[str, ...] = (), **numbers: float,
) -> Path:  # fmt: skip
    """A search by ProbMask of 6 epochs of 50 steps, of which the last is logged only where it is `finished`.

    restarts: processes that went on with it in its middle. numbers: to be logged in place of usual ones.
    """
    config = load_config(
        "digits_probmask", [f"run={folder}", f"train.epochs={EPOCHS}", "finetune.epochs=0", *overrides]
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, new_record())
    (folder / "config.yaml").write_text(to_yaml(config))
    names = [f"layer{i // 3 + 1}.{i % 3}.conv{i % 2 + 1}.weight" for i in range(layers)]
    end = EPOCHS * STEPS if finished else EPOCHS * STEPS - STEPS
    for part in range(restarts + 1):
        begin, stop = end * part // (restarts + 1), end * (part + 1) // (restarts + 1)
        writer = MetricWriter(folder, single(), begin or None)
        writer.settings({k: v for k, v in flat(config).items() if isinstance(v, int | float)}, to_yaml(config))
        for step in range(begin + 1, stop + 1):
            if step % 10 == 0 or step % STEPS == 0:
                _log(writer, step, names, decided, numbers)
        writer.close()
    if finished:
        (folder / "export").mkdir(exist_ok=True)
        (folder / "export" / "summary.json").write_text(json.dumps(_summary(names)))
    return folder


def _log(writer: MetricWriter, step: int, names: list[str], decided: float, numbers: dict[str, float]) -> None:
    done = step / (EPOCHS * STEPS)
    epoch = (step - 1) // STEPS
    tags: dict[str, Any] = {"phase": "search", "epoch": epoch, "samples": step * 64}
    values = {
        "train/loss": 2.3 * math.exp(-3 * done), "train/accuracy": 0.1 + 0.8 * done, "speed/images_per_s": 1000.0,
        "speed/data_wait_fraction": 0.01, "speed/checkpoint_stall_fraction": 0.0, "gradient/clip_factor": 1.0,
        "gradient/prunable.weight": 1.0 - 0.5 * done, "gradient/prunable.probability": 0.2, "lr/prunable.weight": 0.1,
        "lr/prunable.probability": 0.06 * (1 - done), "mask/density": max(0.05, 1 - 2 * done),
        "mask/density_target": max(0.05, 1 - 2 * done), "mask/temperature": 1 - 0.97 * done,
        "mask/decided_fraction": decided * done,
    }  # fmt: skip
    writer.scalars(step, values | {k: v for k, v in numbers.items() if k in values}, total_steps=EPOCHS * STEPS, **tags)
    if step % STEPS == 0:
        accuracy = numbers.get("eval/accuracy", 0.2 + 0.75 * done)
        layers = {f"density/{name}": max(0.05, 1 - done) for name in names}
        zeros = {f"zeros/{name.removesuffix('.weight')}": 0.5 for name in names}
        writer.scalars(step, {"eval/accuracy": accuracy, "eval/loss": 0.5, **layers, **zeros}, **tags)
        limits = [(i + 1) / 64 for i in range(64)]
        counts = Counts(limits, [950] + [0] * 62 + [50], 50.0, 50.0)
        writer.histograms(step, {f"probability/{name}": counts for name in names}, **tags)


def _summary(names: list[str]) -> dict[str, Any]:
    layers = [
        {"name": name, "shape": [8, 8, 3, 3], "kept": 29, "density": 29 / 576, "flops_dense": 1000 * (i + 1),
         "flops_sparse": 50 * (i + 1)} for i, name in enumerate(names)
    ]  # fmt: skip
    return {
        "accuracy": 0.95, "top5": 0.999, "density": 0.0503, "kept": 29 * len(names), "prunable": 576 * len(names),
        "flops_dense": sum(layer["flops_dense"] for layer in layers),
        "flops_sparse": sum(layer["flops_sparse"] for layer in layers), "layers": layers,
    }  # fmt: skip
