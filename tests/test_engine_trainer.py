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
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Plain, State
from ghostmask.engine.sharding.replicas import share
from ghostmask.engine.sharding.rules import Adam, Sgd
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Task, Trainer
from ghostmask.engine.world import World

PARTS = 12


class Net(nn.Module):
    """No batch norm; `brittle` has an infinite gradient and a finite value at 0."""

    def __init__(self, brittle: bool = False) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)
        self.brittle = brittle

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).relu().flatten(1))
        return logits + (logits * 0).sqrt() if self.brittle else logits


class Clamped(Plain):
    """Weights that are held to [-0.1, 0.1] after every update; remembers where its slice lay."""

    def __init__(self) -> None:
        super().__init__({"weight": Sgd(0.9, 5e-4)})
        self.seen: list[tuple[int, int]] = []

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        self.seen.append((part.runs[0].first, part.world.size))
        state["weight"].clamp_(-0.1, 0.1)


def build(world: World, folder: Path, net: nn.Module, data: MemoryData, **train: Any) -> Trainer:
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    others = {n: p for n, p in net.named_parameters() if p.ndim == 1}
    groups = [
        ParameterGroup("weight", weights, Clamped(), 0.05),
        ParameterGroup("other", others, Plain({"weight": Adam()}), 0.01),
    ]
    phase = Phase("train", 0, 5, data.steps_per_epoch)
    task = Task(phase, net, groups, LearningRate("cosine", 20), (Hook(),), clip=1.0)
    store = CheckpointStore(folder / "checkpoints", world)
    reporter = Reporter(MetricWriter(folder, world, None), Progress(world, 20), world)
    config, saving = TrainConfig(log_every=1, **train), CheckpointConfig(every_minutes=0)
    replicas = share(world, PARTS)
    data.parts = replicas.parts
    return Trainer(task, data, config, saving, world, replicas, store, reporter, {})


def train_and_digest(world: World, folder: str, case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Net()
    trainer = build(world, Path(folder) / str(abs(hash(str(case)))), net, MemoryData(world), **case)
    trainer.fit()
    optimizer = trainer.sharded.optimizer
    state = sum(t.numel() * t.element_size() for tensors in optimizer.states for t in tensors.values())
    form = trainer.task.groups[0].reparametrization
    assert isinstance(form, Clamped)
    trainer.store.close()
    trainer.close()
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    largest = max(float(p.detach().abs().max()) for p in net.parameters() if p.ndim > 1)
    assert trainer.evaluation is not None
    digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    return {"weights": flat, "digest": digest, "bytes": state, "seen": form.seen, "largest": largest,
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


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 0), (2, 1), (3, 1), (3, 2), (4, 2)])
def test_every_stage_and_rank_count_trains_the_same_weights(
    ranks: int, stage: int, reference: dict[str, Any], tmp_path: Path
) -> None:
    results = run_distributed(train_and_digest, ranks, str(tmp_path), {"zero_stage": stage})
    assert len({r["digest"] for r in results}) == 1, "ranks ended with different weights"
    assert torch.allclose(results[0]["weights"], reference["weights"], atol=1e-5)
    assert results[0]["largest"] <= 0.1 + 1e-7, "the constraint was not the last word on the weights"
    assert results[0]["images"] == 50, "an evaluation image was missed or counted twice"
    starts = [r["seen"][0][0] for r in results]
    assert len(results[0]["seen"]) == 20
    assert all(size == (1 if stage == 0 else ranks) for r in results for _, size in r["seen"])
    assert starts == ([0] * ranks if stage == 0 else sorted(set(starts)))


def test_the_bytes_of_the_state_fall_as_one_over_the_ranks(tmp_path: Path) -> None:
    held = {
        ranks: [r["bytes"] for r in run_distributed(train_and_digest, ranks, str(tmp_path), {"zero_stage": 1})]
        for ranks in (1, 2, 4)
    }
    print(f"bytes of state per rank: {held}")
    for ranks, sizes in held.items():
        assert max(sizes) <= 1.02 * min(sizes)
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
    step, optimizer = trainer._decide, trainer.sharded.optimizer

    def held() -> list[Tensor]:
        return [*net.parameters(), *(t for state in optimizer.states for t in state.values())]

    def remember(*args: Any) -> Any:
        before[:] = [t.detach().clone() for t in held()]
        return step(*args)

    trainer._decide = remember  # type: ignore[method-assign]
    with pytest.raises(RunStopped) as caught:
        trainer.fit()
    same = all(torch.equal(a, b) for a, b in zip(before, held(), strict=True))
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


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_stops_before_the_update(stage: int, tmp_path: Path) -> None:
    (text, code, same, _), *_ = run_distributed(stopped, 2, str(tmp_path), stage, "gradient")
    assert code == EXIT_NON_FINITE
    assert "gradient of step 0 " in text
    assert same


def test_a_signal_to_one_rank_saves_at_the_next_step_boundary_and_stops_all(tmp_path: Path) -> None:
    for text, code, _, saved in run_distributed(stopped, 2, str(tmp_path), 1, "signal"):
        assert code == EXIT_INTERRUPTED
        assert saved == 2, text


class Normed(nn.Module):
    """A network with batch norm, under a noisy mask in a search."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.bn(self.conv(images)).relu().flatten(1))
        return logits


class Halved(Plain):
    """Evaluated with a hundredth of the weights that are trained: batch norm's statistics do not fit."""

    differs_in_evaluation = True

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        return state["weight"] / 100


def evaluated(world: World, folder: str, stage: int) -> tuple[bool, float, bool]:
    torch.manual_seed(0)
    net = Normed()
    groups = [ParameterGroup("all", dict(net.named_parameters()), Halved({"weight": Sgd()}), 0.05)]
    data = MemoryData(world)
    phase, replicas = Phase("train", 0, 3, data.steps_per_epoch), share(world, 2)
    data.parts = replicas.parts
    store = CheckpointStore(Path(folder) / "checkpoints", world)
    reporter = Reporter(MetricWriter(Path(folder), world, None), Progress(world, 12), world)
    task = Task(phase, net, groups, LearningRate("constant", 12))
    config = TrainConfig(zero_stage=stage, log_every=1)
    trainer = Trainer(task, data, config, CheckpointConfig(every_minutes=0), world, replicas, store, reporter, {})
    trainer.fit()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with trainer.evaluation_weights():
        assert not net.training
        ratio = float((net.conv.weight / before["conv.weight"]).mean())
        variances = (net.bn.running_var / before["bn.running_var"]).median()
    same = all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    store.close()
    return same and net.training, ratio, bool(variances < 1e-3)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1)])
def test_evaluation_has_its_own_weights_and_batch_norm_that_fits_them_and_leaves_no_trace(
    ranks: int, stage: int, tmp_path: Path
) -> None:
    for same, ratio, fits in run_distributed(evaluated, ranks, str(tmp_path), stage):
        assert same
        assert ratio == pytest.approx(0.01)
        assert fits, "the running statistics of the weights that are trained were used"
