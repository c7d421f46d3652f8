"""How many bytes does a rank send per step: dense, with ProbMask, and with bf16 gradients of the probabilities?

Counted, not reckoned: one real step is taken in a fake process group (every collective returns at once), and each
collective that reaches torch.distributed is written down. A ring sends 2 (R - 1) / R of an all-reduce's bytes per rank,
and (R - 1) / R of an all-gather's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghostmask.benchmarks.fake_ranks import on_fake_ranks
from ghostmask.benchmarks.row import Row, share
from ghostmask.benchmarks.timing import Bench
from ghostmask.benchmarks.trainers import Workload, make_trainer
from ghostmask.engine.config import TrainConfig
from ghostmask.engine.signals import StopSignals
from ghostmask.engine.world import World
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

RANKS, QUICK_RANKS = (8, 64, 1024), (8,)
SENT_PER_BYTE = {
    "allreduce": 2.0, "allgather": 1.0, "alltoall": 1.0, "reduce_scatter": 1.0, "reduce": 1.0, "broadcast": 1.0,
}  # fmt: skip
"""Times (R - 1) / R: bytes that a rank sends (in a ring) per byte of the whole (gathered, exchanged) tensor."""
OPTIONS: dict[str, dict[str, Any]] = {
    "dense, stage 1": {"method": "dense", "bar": 1.05},
    "probmask, stage 0": {"method": "probmask", "stage": 0},
    "probmask, stage 1": {"method": "probmask", "bar": 1.05},
    "probmask, stage 2": {"method": "probmask", "stage": 2},
    "probmask, stage 1, bf16": {"method": "probmask", "precision": "bf16", "bar": 0.55},
    "probmask, stage 1, I = 2": {"method": "probmask", "samples": 2},
}


def rows(bench: Bench) -> list[Row]:
    """Case communication, one row per option and number of ranks; baseline: plain DDP of the dense network."""
    work = Workload("resnet20", 2, 32, 10) if bench.quick else Workload("resnet50", 2, 32)
    found = []
    for ranks in QUICK_RANKS if bench.quick else RANKS:
        weights = sum(p.numel() for p in _network(work).parameters())
        ddp = 2 * (ranks - 1) / ranks * 4 * weights / 1e6
        found.append(Row("communication", ddp, "MB", None, None, f"{ranks} ranks: dense, plain DDP (reckoned)"))
        for name, option in OPTIONS.items():
            calls = on_fake_ranks(count_step, ranks, work, option)
            sent = sum(SENT_PER_BYTE[kind] * size for kind, size in calls) * (ranks - 1) / ranks / 1e6
            large = sum(size > 1e6 for _, size in calls)
            note = f"{ranks} ranks: {name}; {len(calls)} collectives, {large} of over 1 MB; baseline: plain float32 DDP"
            found.append(share("communication", sent, ddp, "MB", note, bar=option.get("bar")))
    return found


def count_step(world: World, work: Workload, option: dict[str, Any]) -> list[tuple[str, int]]:
    """(kind, bytes of the whole tensor) of every collective in one optimizer step of rank 0."""
    config = TrainConfig(
        zero_stage=option.get("stage", 1), precision=option.get("precision", "fp32"), log_every=100_000
    )  # fmt: skip
    whole = Workload(work.model, work.batch_size * world.size, work.side, work.num_classes)
    with TemporaryDirectory() as folder:
        samples = option.get("samples", 1)
        trainer = make_trainer(option["method"], whole, world, Path(folder), config, samples=samples)
        batch = next(iter(trainer.data.train(trainer.position.epoch)))
        with _Collectives() as counted:
            trainer.step(batch, StopSignals())
    calls: list[tuple[str, int]] = counted.calls
    return calls


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the collectives that pass through torch's dispatcher while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            kind = next((k for k in SENT_PER_BYTE if k in func.__name__), None)
            sizes = [_bytes(arg) for arg in args[:2]]
            if kind is not None:
                self.calls.append((kind, max(sizes)))
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


def _network(work: Workload) -> nn.Module:
    with torch.device("cpu"):
        return build_model(ModelConfig(name=work.model), work.num_classes, (3, work.side, work.side), 0)
