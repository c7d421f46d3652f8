"""A whole ghostmask run, phases and checkpoints and all, on images in memory instead of FFCV's."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from memory_data import MemoryData
from torch import Tensor

from ghostmask.engine.config import CheckpointConfig, FinetuneConfig, OptimConfig, TrainConfig
from ghostmask.engine.hooks import Hook
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.open_run import open_owned
from ghostmask.launcher.recipe import recipe_hooks
from ghostmask.launcher.run import Run, Shares, assemble, build_method
from ghostmask.launcher.settings import settings_of
from ghostmask.models.config import ModelConfig

CONFIG = RunConfig(
    seed=3,
    model=ModelConfig(name="conv4"),
    mask=settings_of("probmask")(density=0.1, lr=0.03, samples=2, start_fraction=0.0, end_fraction=0.7),  # type: ignore[call-arg]
    optim=OptimConfig(lr=0.02, clip=3.0),
    train=TrainConfig(epochs=3, log_every=1, threads=1, replicas=4),
    finetune=FinetuneConfig(epochs=2, lr=0.01),
    checkpoint=CheckpointConfig(every_steps=3, every_minutes=0, keep=3),
)  # fmt: skip
"""Search over 3 epochs of 4 steps, then 2 of fine-tuning; a checkpoint every 3 steps and at the end of epochs."""

QUICK: dict[str, Any] = {
    "density": 0.1, "start_fraction": 0.0, "end_fraction": 0.7, "lr": 0.03, "samples": 2, "update_every": 2,
    "score_batch": 48, "score_batches": 1, "iterations": 4, "round_fraction": 0.6, "rewind": "1ep",
    "r_init": -3.0, "r_decay": 0.3, "penalty": 1e-3, "log_variance": -4.0, "open_fraction": 0.09, "ramp_fraction": 0.9,
    "first_fraction": 0.25, "phase_fraction": 0.25, "last_dense_fraction": 0.6, "last_fraction": 0.75,
}  # fmt: skip
"""Values of the methods' settings with which a run of 3 epochs means something."""


def configured(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """`config` with fields of its sections replaced: configured(CONFIG, train={"zero_stage": 2}).

    mask={"method": ...} takes that method's settings, at QUICK's values where it has them.
    """
    mask = sections.pop("mask", {})
    changed = replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})
    method = mask.get("method", config.mask.method)
    if method == config.mask.method:
        return replace(changed, mask=replace(config.mask, **mask))
    cls = settings_of(method)
    quick = {f.name: QUICK[f.name] for f in fields(cls) if f.name in QUICK}
    return replace(changed, mask=cls(**{**quick, **mask}))


def memory_run(world: World, folder: Path, config: RunConfig, data: MemoryData | None = None) -> tuple[Run, Any]:
    """The run in `folder`, new or resumed, and the checkpoint it goes on from (None for a new one)."""
    shares = Shares.of(config, world)
    data = data or MemoryData(world)
    data.parts = shares.plain.parts
    method = build_method(config, world, data)
    opened = open_owned(folder, config, world, data)
    recipe = recipe_hooks(config, data, world)
    return assemble(config, folder, data, method, opened, shares, recipe), opened.saved


@dataclass(frozen=True)
class Outcome:
    """What a finished run left on one rank: the network's state, masks, and (step, samples) it was fed."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    fed: list[tuple[int, list[int]]]
    resumed_at: int

    @property
    def digest(self) -> str:
        """Equal exactly when every bit of weights and masks is."""
        tensors = [*self.weights.values(), *self.masks.values()]
        return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()

    @property
    def kept(self) -> int:
        """Ones in all masks."""
        return sum(int(m.sum()) for m in self.masks.values())


def complete(world: World, folder: str, config: RunConfig, kill_step: int = 0, delay_s: float = 0.0) -> Outcome:
    """Run or resume to the end; kill_step: every rank kills itself there instead, delay_s later."""
    data = MemoryData(world)
    run, saved = memory_run(world, Path(folder), config, data)
    run.hooks = (KillAt(kill_step, delay_s),) if kill_step else ()
    run.execute(saved)
    masks = {name: mask.clone() for name, mask in run.masks().items()}
    weights = {n: t.detach().clone() for n, t in run.net.state_dict().items()}
    run.close()
    return Outcome(weights, masks, data.fed, saved.step if saved else 0)


def losses(folder: Path | str) -> list[float]:
    """The training loss of every step of the run in `folder`, from its metrics.jsonl (train.log_every=1)."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(found) == list(range(1, len(found) + 1)), "a step was logged twice, or not at all"
    return list(found.values())


class KillAt(Hook):
    """Kills this process, as the kernel would, `delay_s` after `step` optimizer steps of the run are done."""

    def __init__(self, step: int, delay_s: float) -> None:
        self.step, self.delay_s = step, delay_s

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.position.step == self.step:
            threading.Timer(self.delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            if not self.delay_s:
                threading.Event().wait()
