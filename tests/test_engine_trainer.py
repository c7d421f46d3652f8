"""Does the loop compute what it says, at every ZeRO stage, and does it stop when it must?"""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.config import CheckpointConfig, TrainConfig
from ghostmask.engine.errors import EXIT_INTERRUPTED, EXIT_NON_FINITE, RunStopped
from ghostmask.engine.hooks import Hook
from ghostmask.engine.loss import LossModule
from ghostmask.engine.metrics import MetricWriter
from ghostmask.engine.position import Phase
from ghostmask.engine.progress import Progress
from ghostmask.engine.reporting import Reporter
from ghostmask.engine.schedule import LearningRate
from ghostmask.engine.sharding.optimizer import Adam, ParameterGroup, Sgd
from ghostmask.engine.sharding.shards import Shard
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Task, Trainer
from ghostmask.engine.world import World


class Net(nn.Module):
    """No batch norm; `brittle` has an infinite gradient and a finite value at 0."""

    def __init__(self, brittle: bool = False) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)
        self.brittle = brittle

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).relu().flatten(1))
        return logits + (logits * 0).sqrt() if self.brittle else logits


class Losses(Hook):
    """Keeps the loss that every rank's report saw."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []

    def on_start(self, trainer: Trainer) -> None:
        self.shards = list(trainer.sharded.shards)


def build(
    world: World, folder: Path, net: nn.Module, data: MemoryData, projection: Any = None, **train: Any
) -> Trainer:
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    others = {n: p for n, p in net.named_parameters() if p.ndim == 1}
    groups = [
        ParameterGroup("weight", weights, Sgd(0.9, 5e-4), 0.05, projection),
        ParameterGroup("other", others, Adam(), 0.01),
    ]
    phase = Phase("train", 0, 5, data.steps_per_epoch)
    task = Task(phase, net, groups, LearningRate("cosine", 20), (Losses(),), clip=1.0)
    store = CheckpointStore(folder / "checkpoints", world)
    reporter = Reporter(MetricWriter(folder, world, None), Progress(world, 20), world)
    config = TrainConfig(log_every=1, **train)
    return Trainer(task, data, config, CheckpointConfig(every_minutes=0), world, store, reporter, {})


def train_and_digest(world: World, folder: str, case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Net()
    seen: list[tuple[int, bool]] = []

    def halve(shard: Shard) -> None:
        seen.append((shard.first_index, shard.replicated))
        shard.tensor.clamp_(-0.1, 0.1)

    trainer = build(world, Path(folder) / str(abs(hash(str(case)))), net, MemoryData(world), halve, **case)
    trainer.fit()
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    state = sum(v.numel() * v.element_size() for s in trainer.sharded.optimizer.state.values() for v in s.values())
    masters = sum(s.tensor.numel() * 4 for s in trainer.sharded.shards)
    trainer.store.close()
    trainer.close()
    largest = max(float(p.detach().abs().max()) for p in net.parameters() if p.ndim > 1)
    assert trainer.evaluation is not None
    digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    return {"weights": flat, "digest": digest, "bytes": state + masters, "seen": seen, "largest": largest,
            "images": trainer.evaluation.num_images}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reference")
    (result,) = run_distributed(train_and_digest, 1, str(folder), {"zero_stage": 0})
    return result  # type: ignore[no-any-return]


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    torch.manual_seed(0)
    net, images, labels = Net(), torch.randn(5, 3, 8, 8), torch.tensor([0, 3, 1, 2, 2])
    loss, _ = LossModule(net, 0.3, "fp32", compiled=False)(images, labels)
    wanted = functional.one_hot(labels, 4) * 0.7 + 0.3 / 4
    torch.testing.assert_close(loss, -(wanted * net(images).log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 0), (2, 1), (3, 1), (3, 2)])
def test_every_stage_and_rank_count_trains_the_same_weights(
    ranks: int, stage: int, reference: dict[str, Any], tmp_path: Path
) -> None:
    results = run_distributed(train_and_digest, ranks, str(tmp_path), {"zero_stage": stage})
    assert len({r["digest"] for r in results}) == 1, "ranks ended with different weights"
    assert torch.allclose(results[0]["weights"], reference["weights"], atol=1e-5)
    assert results[0]["largest"] <= 0.1 + 1e-7, "the projection was not the last word on the weights"
    assert results[0]["images"] == 50, "an evaluation image was missed or counted twice"
    starts = [r["seen"][0][0] for r in results]
    assert len(results[0]["seen"]) == 20
    assert all(replicated == (stage == 0 or ranks == 1) for r in results for _, replicated in r["seen"])
    assert starts == ([0] * ranks if stage == 0 else sorted(set(starts)))


def test_accumulated_microbatches_equal_one_batch(reference: dict[str, Any], tmp_path: Path) -> None:
    results = run_distributed(train_and_digest, 2, str(tmp_path), {"zero_stage": 1, "accumulation": 3})
    assert torch.allclose(results[0]["weights"], reference["weights"], atol=1e-5)


def test_optimizer_state_and_master_bytes_fall_as_one_over_the_ranks(tmp_path: Path) -> None:
    held = {
        ranks: [r["bytes"] for r in run_distributed(train_and_digest, ranks, str(tmp_path), {"zero_stage": 1})]
        for ranks in (1, 2, 4)
    }
    print(f"bytes of optimizer state and master weights per rank: {held}")
    for ranks, sizes in held.items():
        assert len(set(sizes)) == 1
        assert sizes[0] == pytest.approx(held[1][0] / ranks, rel=0.02)


def stopped(world: World, folder: str, stage: int, kind: str) -> tuple[str, int, bool, int]:
    torch.manual_seed(0)
    net, data = Net(brittle=kind == "gradient"), MemoryData(world)
    if kind == "loss" and world.rank == world.size - 1:
        data.poison_at = (1, 2)
    trainer = build(world, Path(folder), net, data, zero_stage=stage)
    if kind == "signal" and world.rank == world.size - 1:
        trainer.task.hooks[0].on_step_end = lambda t: os.kill(os.getpid(), signal.SIGUSR1)  # type: ignore[method-assign]
    before: list[Tensor] = []
    step = trainer._decide

    def remember(*args: Any) -> Any:
        before[:] = [p.detach().clone() for p in net.parameters()]
        return step(*args)

    trainer._decide = remember  # type: ignore[method-assign]
    with pytest.raises(RunStopped) as caught:
        trainer.fit()
    same = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    trainer.store.wait()
    saved = trainer.store.latest()
    trainer.store.close()
    return str(caught.value), caught.value.exit_code, same, saved.step if saved else -1


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(stage: int, tmp_path: Path) -> None:
    for text, code, same, saved in run_distributed(stopped, 2, str(tmp_path), stage, "loss"):
        assert code == EXIT_NON_FINITE
        assert "loss of step 6 " in text
        assert same, "the weights moved on a step with a non-finite loss"
        assert saved == 4, "the last epoch's checkpoint must be the newest"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_gradient_that_is_not_finite_stops_before_the_update(stage: int, tmp_path: Path) -> None:
    (text, code, same, _), *_ = run_distributed(stopped, 2, str(tmp_path), stage, "gradient")
    assert code == EXIT_NON_FINITE
    assert "gradient of step 0 " in text
    assert same


def test_a_signal_to_one_rank_saves_at_the_next_step_boundary_and_stops_all(tmp_path: Path) -> None:
    for text, code, _, saved in run_distributed(stopped, 2, str(tmp_path), 1, "signal"):
        assert code == EXIT_INTERRUPTED
        assert saved == 2, text
