"""ghostmask evaluate: the accuracy of a run's exported network, measured afresh, on its own or on other images."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostmask.data_pipelines.open import preprocessing
from ghostmask.engine.agree import on_main
from ghostmask.engine.atomic import read_small
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.errors import InputError, bad_value, output, say, to_stderr
from ghostmask.engine.evaluation import Score, score
from ghostmask.engine.world import connect
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import SUMMARY_FILE, accuracies, load_export, summarise, use
from ghostmask.launcher.folder import read_run
from ghostmask.launcher.locate import writing_to
from ghostmask.launcher.record import sealed_meta
from ghostmask.launcher.run import open_data
from ghostmask.launcher.settings import differences, to_dict
from ghostmask.launcher.summary import closing_table
from ghostmask.launcher.table import markdown
from ghostmask.masks.mask_file import fill
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model

FIELD = "RUN"
EVALUATED = ("classes", "evaluation images", "evaluation content")
"""Of a data set's identity, what its evaluation depends on."""


def evaluate(run: Path, config: RunConfig, *, as_json: bool = False, per_class: str | None = None) -> int:
    """Print the summary of RUN/export/model.safetensors on its evaluation images, which any number of ranks share.

    config: the run's, or with other data of the same classes (see folder.other_data): then that is said. per_class: a
    file to write the accuracy of each class to, or "-" to print it, as part of the JSON where that is asked for.
    """
    file = run / "export" / "model.safetensors"
    if not file.is_file():
        raise InputError(
            f"RUN = {str(run)!r}: there is no {file}; finish the run, or write it with: ghostmask export {run}"
        )
    with connect(config.train.device, config.train.timeout_minutes) as world:
        data = open_data(config, world)
        on_main(world, lambda: _check_data(run, config, data))
        world.pulse.enter(f"evaluation of {file}")
        net = build_model(config.model, data.num_classes, data.image_shape, config.seed)
        fill(net, load_export(file, FIELD), FIELD, str(file))
        net.to(world.device).eval()
        result = score(
            net, data.evaluate(), world, config.train.precision, flip=config.train.eval_flip,
            num_classes=data.num_classes if per_class else 0,
        )  # fmt: skip
        summary = _summary(config, net, data.image_shape, result)
        data.close()
        if world.is_main:
            rows = _classes(config, result)
            if per_class == "-" and as_json:
                summary["per_class"] = rows
            output(json.dumps(summary) if as_json else closing_table(summary, run, file.parent, 0.0))
            if rows and not (per_class == "-" and as_json):
                _write(rows, str(per_class))
        world.barrier()
    return 0


def check_classes(root: str, before: list[str], now: list[str]) -> None:
    """Raise InputError where images have other classes than a network was trained on; [] = they have no names."""
    if before and now and before != now:
        differ = next((f"{a!r} and {b!r}" for a, b in zip(before, now, strict=False) if a != b), "none of the first")
        fix = (
            f"it has {len(now)} classes, the run {len(before)}, and they differ ({differ}); give data of the same ones"
        )
        raise bad_value("data.root", root, fix)


def _check_data(run: Path, config: RunConfig, data: DataPipeline) -> None:
    """Say that the images are others than the run's, where they are; raise InputError where their classes are."""
    chosen = differences(read_run(run), config)
    summary = run / "export" / SUMMARY_FILE
    try:
        before = (
            json.loads(read_small(summary)).get("preprocessing", {}).get("classes", []) if summary.is_file() else []
        )
    except (OSError, ValueError, AttributeError) as error:
        fix = f"cannot be read ({error}); write it again: ghostmask export RUN"
        raise InputError(f"RUN = {str(summary)!r}: {fix}") from None
    check_classes(config.data.root, before, preprocessing(config.data)["classes"])
    sealed = (sealed_meta(run) or {}).get("data", {})
    changed = [name for name in EVALUATED if sealed.get(name, data.identity[name]) != data.identity[name]]
    root = config.data.root if config.data.root != read_run(run).data.root else ""
    if chosen or root:
        words = "; ".join([f"data.root = {root}"] * bool(root) + chosen)
        same = "" if changed else ", which are the same images" if sealed else ""
        say(f"measured on other data than the run's ({words}){same}")
    elif changed:
        to_stderr(f"the data changed since the run was trained ({', '.join(changed)}); this is measured on them")


def _summary(config: RunConfig, net: torch.nn.Module, shape: tuple[int, int, int], result: Score) -> dict[str, Any]:
    weights = prunable_weights(net, config.mask.dense_layers, config.mask.only)
    masks = {} if config.mask.method == "dense" else {name: w.detach() != 0 for name, w in weights.items()}
    found = {**accuracies(result.accuracy, result.top5), "num_images": result.num_images, "preprocessing": use(config)}
    return {**found, **summarise(net, masks, shape), "config": to_dict(config)}


def _classes(config: RunConfig, result: Score) -> list[dict[str, Any]]:
    """A row per class; [] unless they were counted."""
    counts: Tensor | None = result.per_class
    if counts is None:
        return []
    names = preprocessing(config.data)["classes"] or [str(number) for number in range(len(counts))]
    rows = []
    for name, (right, in_five, images) in zip(names, counts.tolist(), strict=True):
        row = {"class": name, "images": images, "accuracy": right / images if images else None}
        rows.append(row if result.top5 is None else row | {"top5": in_five / images if images else None})
    return rows


def _write(rows: list[dict[str, Any]], file: str) -> None:
    head = list(rows[0])
    if file == "-":
        shown = [[f"{value:.2%}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
        output(markdown(head, shown))
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, head)
    writer.writeheader()
    writer.writerows(rows)
    with writing_to("--per-class", Path(file)) as writing:
        writing.write_text(text.getvalue(), encoding="utf-8")
