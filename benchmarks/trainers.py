"""How does a benchmark get the system's own trainer: the main phase of a mask method on one batch, again and again."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from ghostmask.benchmarks.timing import Bench
from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.config import CheckpointConfig, FinetuneConfig, OptimConfig, TrainConfig
from ghostmask.engine.data import Batch, Parts
from ghostmask.engine.metrics import MetricWriter
from ghostmask.engine.position import Phase
from ghostmask.engine.progress import Progress
from ghostmask.engine.registry import resolve
from ghostmask.engine.reporting import Reporter
from ghostmask.engine.schedule import LearningRate
from ghostmask.engine.sharding.replicas import Replicas
from ghostmask.engine.trainer import Task, Trainer
from ghostmask.engine.world import World
from ghostmask.masks.method import MaskMethod, Recipe
from ghostmask.masks.registry import METHODS
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

EPOCHS, STEPS_PER_EPOCH, EPOCH = 100, 1000, 50
"""Steps are timed in the middle of a long run, where density has fallen and the projection binds."""


@dataclass(frozen=True)
class Workload:
    """What is trained. batch_size: images of all ranks together; side: of an image, in pixels."""

    model: str
    batch_size: int
    side: int
    num_classes: int = 1000

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.side} x {self.side} pixels"


class OneBatch:
    """A DataPipeline whose every batch is the same random one, on the device: data costs nothing."""

    steps_per_epoch = STEPS_PER_EPOCH

    def __init__(self, work: Workload, world: World, parts: Parts | None = None) -> None:
        """parts: None = as many as ranks. A part's images depend on its number alone, not on the rank."""
        self.parts = parts or Parts(world.size, world.rank, 1)
        self.num_classes, self.batch_size, self.image_shape = (
            work.num_classes,
            work.batch_size,
            (3, work.side, work.side),
        )
        self.num_train, self.num_eval = STEPS_PER_EPOCH * work.batch_size, work.batch_size
        self.identity: dict[str, int | str] = {"batch size": work.batch_size}
        first, end = self.parts.first, self.parts.first + self.parts.count
        pieces = [self._part(number, world.device) for number in range(first, end)]
        images, labels = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
        self.batch = Batch(images.contiguous(memory_format=torch.channels_last), labels)

    def train(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """The batch, for the rest of the epoch."""
        yield from repeat(self.batch, STEPS_PER_EPOCH - first_step)

    def evaluate(self) -> Generator[Batch]:
        """The batch, once."""
        yield self.batch

    def close(self) -> None:
        """Nothing to stop."""

    def _part(self, number: int, device: torch.device) -> Batch:
        generator = torch.Generator(device).manual_seed(5 + number)
        shape = (self.batch_size // self.parts.total, *self.image_shape)
        images = torch.randn(shape, generator=generator, device=device)
        return Batch(images, torch.randint(self.num_classes, shape[:1], generator=generator, device=device))


def workload(bench: Bench) -> Workload:
    """ResNet-50 at 224 pixels: batch 32 on a CPU, 256 on a GPU; quick: a small network on small images."""
    if bench.quick:
        return Workload("resnet20", 4, 32, 10)
    return Workload("resnet50", 256 if bench.device.type == "cuda" else 32, 224)


def make_trainer(
    method: str, work: Workload, world: World, folder: Path, config: TrainConfig, *, samples: int = 1
) -> Trainer:
    """Collective: the trainer of the main phase of `method` ("probmask", with `samples` = I, or "dense").

    As many parts as ranks, one noise for all of them.
    """
    replicas = Replicas(Parts(world.size, world.rank, 1), 1, world, tuple(range(world.size)), None)
    data = OneBatch(work, world, replicas.parts)
    net = build_model(ModelConfig(name=work.model), work.num_classes, data.image_shape, 0).to(world.device)
    cls: type[MaskMethod] = resolve(METHODS[method])
    settings: Any = cls.Settings
    mask = settings(density=0.1, samples=samples) if method == "probmask" else settings(method=method)
    bf16 = config.precision == "bf16" and config.zero_stage > 0
    chosen = cls(mask, net, Recipe(OptimConfig(lr=1e-3), FinetuneConfig(), EPOCHS, 0, bf16), world)
    phase = Phase(chosen.phases()[0][0], 0, EPOCHS, STEPS_PER_EPOCH)
    setup = chosen.enter(phase)
    task = Task(
        phase, setup.model.to(world.device), setup.groups, LearningRate("constant", phase.end_step),
        setup.hooks, setup.passes,
    )  # fmt: skip
    # Never saves: no group of its own, which fake ranks could not make.
    store = CheckpointStore(folder / "checkpoints", replace(world, group=None))
    reporter = Reporter(MetricWriter(folder, world, None), Progress(world, phase.end_step), world)
    saving = CheckpointConfig(every_minutes=0)
    trainer = Trainer(task, data, config, saving, world, replicas, store, reporter, {})
    trainer.position = replace(trainer.position, step=EPOCH * STEPS_PER_EPOCH)
    trainer.sharded.optimizer.updates = trainer.position.step
    trainer.sharded.optimizer.refresh()
    trainer.model.train()
    for hook in task.hooks:
        hook.on_start(trainer)
        hook.on_epoch_start(trainer)
    return trainer


def train_config(bench: Bench) -> TrainConfig:
    """On CUDA bf16 and torch.compile, channels_last everywhere; nothing is reported while steps are timed."""
    fast = bench.device.type == "cuda"
    return TrainConfig(precision="bf16" if fast else "fp32", compile=fast, log_every=100_000)
