"""How many bytes does a rank hold at 1 to 1,024 ranks and ZeRO stages 0 to 2: a model, and what is really held.

With W weights of which P are prunable (a mask's probabilities), R ranks (1 at stage 0), in float32:

    parameters   4 W                     the masked weights: whole on every rank
    state        (8 W + 12 P) / R        dense weights, momentum; probabilities, Adam's moments
    gradients    4 W / R

During backward come the activations and a few buckets of 4 x BUCKET_ELEMENTS bytes (stage 0: 4 W).

The measurement adds up the storages of all tensors that are alive between the backward pass and the update: on real
processes up to 8 ranks, beyond that on rank 0 of a fake process group. It needs no GPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ghostmask.benchmarks.fake_ranks import on_fake_ranks
from ghostmask.benchmarks.row import Row, share
from ghostmask.benchmarks.timing import Bench
from ghostmask.benchmarks.trainers import Workload, make_trainer
from ghostmask.engine.config import TrainConfig
from ghostmask.engine.signals import StopSignals
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World

REAL_RANKS, FAKE_RANKS = (1, 2, 4, 8), (64, 1024)
STAGES = (0, 1, 2)
LOOKS = 10
"""Times that the tensors which are alive are looked at; the smallest counts."""
ASKED = (1, 8, 230.0)
"""Stage, ranks, and MB that a rank may hold there of ResNet-50."""


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    parameters: int
    state: int
    gradients: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.state + self.gradients

    def __str__(self) -> str:
        mb = [f"{x / 1e6:.0f}" for x in (self.parameters, self.state, self.gradients)]
        return f"parameters {mb[0]}, state {mb[1]}, gradients {mb[2]} MB"


def rows(bench: Bench) -> list[Row]:
    """Case memory, one row per stage and number of ranks: value measured, baseline the model."""
    work = Workload("resnet20", 2, 32, 10) if bench.quick else Workload("resnet50", 2, 32)
    real, fake = ((2,), (64,)) if bench.quick else (REAL_RANKS, FAKE_RANKS)
    found = []
    for stage in STAGES:
        for ranks in (*real, *fake):
            if ranks in real:
                held, weights, prunable = run_distributed(measure, ranks, work, stage)[0]
            else:
                held, weights, prunable = on_fake_ranks(measure, ranks, work, stage)
            model = modelled(weights, prunable, ranks, stage)
            what = f"stage {stage}, {ranks} {'processes' if ranks in real else 'ranks (fake group)'}"
            note = f"{what}: {held}; baseline: model"
            found.append(share("memory", held.total / 1e6, model.total / 1e6, "MB", note))
            if (stage, ranks) == ASKED[:2]:
                note = f"{what}, beside activations; baseline: what was asked for"
                found.append(share("memory_asked", held.total / 1e6, ASKED[2], "MB", note, bar=1.0))
    return found


def modelled(weights: int, prunable: int, ranks: int, stage: int) -> Held:
    """The table above. weights, prunable: their numbers, over the whole network."""
    split = ranks if stage else 1
    return Held(4 * weights, (8 * weights + 12 * prunable) // split, 4 * weights // split)


def measure(world: World, work: Workload, stage: int) -> tuple[Held, int, int]:
    """Collective: (bytes that this rank holds after backward, weights, prunable ones of them)."""
    whole = Workload(work.model, work.batch_size * world.size, work.side, work.num_classes)
    config = TrainConfig(zero_stage=stage, log_every=100_000)
    with TemporaryDirectory() as folder:
        trainer = make_trainer("probmask", whole, world, Path(folder), config)
        found: list[Held] = []

        update = trainer.sharded.engine.step

        def look_and_update() -> None:
            found.append(min((_held(trainer) for _ in _looks()), key=lambda held: held.total))
            update()

        trainer.sharded.engine.step = look_and_update
        trainer.step(next(iter(trainer.data.train(trainer.position.epoch))), StopSignals())
        sizes = [sum(p.numel() for p in group.parameters.values()) for group in trainer.task.groups]
    return found[0], sum(sizes), sizes[0]


def _looks() -> Iterator[int]:
    """Gloo's thread lets go of a finished collective's tensors a moment after `wait`: look a few times."""
    for i in range(LOOKS):
        time.sleep(0.05 if i else 0)
        yield i


def _held(trainer: Trainer) -> Held:
    gc.collect()  # a bucket in a cycle that nothing reaches is not held
    parameters = [p.data for p in trainer.model.parameters()]
    state = [t for tensors in trainer.sharded.optimizer.states for t in tensors.values()]
    other = [*trainer.model.buffers(), *next(iter(trainer.data.evaluate()))]
    alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.layout == torch.strided]
    grads = [t.grad for t in alive if t.is_leaf and t.grad is not None]
    seen: set[int] = set()
    _, parameter_bytes, state_bytes, gradient_bytes = (
        _new_bytes(tensors, seen) for tensors in (other, parameters, state, [*alive, *grads])
    )
    return Held(parameter_bytes, state_bytes, gradient_bytes)


def _new_bytes(tensors: list[Tensor], seen: set[int]) -> int:
    """Bytes of the storages behind the tensors that are not in `seen`, which they then are."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
