"""Does the loop compute what it says, at every ZeRO stage, and does it stop when it must?"""

from __future__ import annotations

import copy
import hashlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, configured, memory_run
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.batchnorm import batch_norms, statistics
from ghostmask.engine.checkpoint.dcp import IndexedReader
from ghostmask.engine.checkpoint.store import CheckpointStore, Saved
from ghostmask.engine.config import CheckpointConfig, TrainConfig
from ghostmask.engine.data import Parts
from ghostmask.engine.errors import EXIT_INTERRUPTED, EXIT_NON_FINITE, InputError, RunStopped
from ghostmask.engine.hooks import Hook
from ghostmask.engine.loss import Loss, LossModule
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
from ghostmask.engine.trainer import EVALUATION_BATCHES, Task, Trainer
from ghostmask.engine.world import World, single
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model

PRUNABLE = 8 * 27 + 7 * 5 + 4 * 288
PARTS = 6
"""Parts of the batch of 24 images: 1, 2 and 3 ranks can share them."""


class Net(nn.Module):
    """No batch norm; `spare` gets no gradient; `brittle` has an infinite gradient and a finite value at 0."""

    def __init__(self, brittle: bool = False) -> None:
        super().__init__()
        self.conv, self.spare, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(5, 7), nn.Linear(8 * 36, 4)
        self.brittle = brittle

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).relu().flatten(1))
        return logits + (logits * 0).sqrt() if self.brittle else logits


class Bounded(Plain):
    """Weights within [-0.1, 0.1] after every update."""

    def __init__(self) -> None:
        super().__init__({"weight": Sgd(0.9, 5e-4)})
        self.calls: list[tuple[int, int]] = []

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        self.calls.append((updates, part.numel))
        state["weight"].clamp_(-0.1, 0.1)


def build(world: World, folder: Path, net: nn.Module, data: MemoryData, form: Plain, **train: Any) -> Trainer:
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    others = {n: p for n, p in net.named_parameters() if p.ndim == 1}
    groups = [
        ParameterGroup("weight", weights, form, 0.05),
        ParameterGroup("other", others, Plain({"weight": Adam()}), 0.01),
    ]
    phase = Phase("train", 0, 5, data.steps_per_epoch)
    task = Task(phase, net, groups, LearningRate("cosine", 20), (Hook(),), clip=1.0)
    replicas = share(world, PARTS)
    data.parts = replicas.parts
    store = CheckpointStore(folder / "checkpoints", world)
    reporter = Reporter(MetricWriter(folder, world, None), Progress(world, 20), world)
    config = TrainConfig(log_every=1, **train)
    return Trainer(task, data, config, CheckpointConfig(every_minutes=0), world, replicas, store, reporter, {})


def train_and_digest(world: World, folder: str, stage: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net, form = Net(), Bounded()
    trainer = build(world, Path(folder) / f"{stage} {world.size}", net, MemoryData(world), form, zero_stage=stage)
    trainer.fit()
    optimizer = trainer.sharded.optimizer
    held = sum(t.numel() * t.element_size() for s in optimizer.states for t in s.values())
    trainer.store.close()
    trainer.close()
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert trainer.evaluation is not None
    return {
        "weights": flat, "digest": hashlib.sha256(flat.numpy().tobytes()).hexdigest(), "bytes": held,
        "largest": max(float(p.detach().abs().max()) for p in net.parameters() if p.ndim > 1), "calls": form.calls,
        "images": trainer.evaluation.num_images, "accuracy": trainer.evaluation.accuracy,
        "hooks": sum(len(p._post_accumulate_grad_hooks or ()) for p in net.parameters()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ranks, stage) -> what each rank ended with, made once."""
    made: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def get(ranks: int, stage: int) -> list[dict[str, Any]]:
        if (ranks, stage) not in made:
            folder = str(tmp_path_factory.mktemp("trained"))
            made[ranks, stage] = run_distributed(train_and_digest, ranks, folder, stage)
        return made[ranks, stage]

    return get


def by_hand() -> Tensor:
    """The same training in float64 with torch's optimizers: mean loss over whole batches, joint clipping, the bound."""
    torch.manual_seed(0)
    net, data = Net().double(), MemoryData(single())
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    optimizers = [torch.optim.SGD(weights, 0.05, 0.9, weight_decay=5e-4), torch.optim.Adam(others, 0.01)]
    schedule = LearningRate("cosine", 20)
    for step in range(20):
        batch = next(data.train(step // 4, step % 4))
        loss = functional.cross_entropy(net(batch.images.double()), batch.labels)
        for optimizer, lr in zip(optimizers, (0.05, 0.01), strict=True):
            optimizer.param_groups[0]["lr"] = lr * schedule.factor(step)
            optimizer.zero_grad()
        loss.backward()
        for p in net.spare.parameters():
            p.grad = torch.zeros_like(p)  # torch would leave it alone; ours is decayed like all others
        norm = torch.cat([p.grad.reshape(-1) for p in net.parameters()]).norm()
        for p in net.parameters():
            p.grad /= norm.clamp(min=1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for p in weights:
                p.clamp_(-0.1, 0.1)
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (2, 0), (2, 1), (3, 1), (3, 2)])
def test_every_stage_and_rank_count_trains_as_torch_does_on_whole_batches(ranks: int, stage: int, trained: Any) -> None:
    results = trained(ranks, stage)
    assert len({r["digest"] for r in results}) == 1, "ranks ended with different weights"
    torch.testing.assert_close(results[0]["weights"].double(), by_hand(), atol=2e-5, rtol=0)
    assert results[0]["largest"] <= 0.1 + 1e-7, "the constraint was not the last word on the weights"
    assert results[0]["images"] == 50, "an evaluation image was missed or counted twice"
    assert results[0]["hooks"] == 0, "hooks were left on the parameters"
    held = [r["calls"][0][1] for r in results]
    assert sum(held) == PRUNABLE if stage else set(held) == {PRUNABLE}
    assert [number for number, _ in results[0]["calls"]] == list(range(1, 21))


def test_the_bytes_of_the_state_fall_as_one_over_the_ranks(trained: Any) -> None:
    whole = trained(1, 1)[0]["bytes"]
    for ranks, stage in ((2, 1), (3, 1), (3, 2)):
        sizes = [r["bytes"] for r in trained(ranks, stage)]
        assert sizes == pytest.approx([whole / ranks] * ranks, rel=0.02), (ranks, stage)
    assert [r["bytes"] for r in trained(2, 0)] == [whole, whole]


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    torch.manual_seed(0)
    net, images, labels = Net(), torch.randn(5, 3, 8, 8), torch.tensor([0, 3, 1, 2, 2])
    loss, (correct, *_) = LossModule(net, Loss(0.3), "fp32", compiled=False)(images, labels)
    wanted = functional.one_hot(labels, 4) * 0.7 + 0.3 / 4
    torch.testing.assert_close(loss, -(wanted * net(images).log_softmax(1)).sum(1).mean())
    assert int(correct) == int((net(images).argmax(1) == labels).sum())


class SignalAt(Hook):
    """SIGUSR1 to this process after a step, or after the evaluation of the last epoch."""

    def __init__(self, step: int, late: bool) -> None:
        self.step, self.late = step, late

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.position.step == self.step and not self.late:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_epoch_end(self, trainer: Trainer) -> None:
        if trainer.position.step == self.step and self.late:
            os.kill(os.getpid(), signal.SIGUSR1)


def stopped(world: World, folder: str, stage: int, kind: str) -> tuple[str, int, bool, int]:
    torch.manual_seed(0)
    net, data, last = Net(brittle=kind == "gradient"), MemoryData(world), world.rank == world.size - 1
    if kind == "loss" and last:
        data.poison_at = (1, 2)
    trainer = build(world, Path(folder), net, data, Bounded(), zero_stage=stage)
    if "signal" in kind and last:
        hook = SignalAt(20, True) if kind == "late signal" else SignalAt(1, False)
        object.__setattr__(trainer.task, "hooks", (hook,))
    before: list[Tensor] = []
    states: list[State] = []
    decide = trainer._decide

    def remember(*args: Any) -> Any:
        before[:] = [p.detach().clone() for p in net.parameters()]
        states[:] = [{n: t.clone() for n, t in s.items()} for s in trainer.sharded.optimizer.states]
        return decide(*args)

    trainer._decide = remember  # type: ignore[method-assign]
    with pytest.raises(RunStopped) as caught:
        trainer.fit()
    same = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    for old, new in zip(states, trainer.sharded.optimizer.states, strict=True):
        same = same and all(torch.equal(old[n], new[n]) for n in old)
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
    for text, code, same, saved in run_distributed(stopped, 2, str(tmp_path), stage, "gradient"):
        assert code == EXIT_NON_FINITE
        assert "gradient of step 0 " in text
        assert same, "the state moved on a step with a non-finite gradient"
        assert saved == -1


def test_a_signal_to_one_rank_saves_at_the_next_step_boundary_and_stops_all(tmp_path: Path) -> None:
    for text, code, _, saved in run_distributed(stopped, 2, str(tmp_path), 1, "signal"):
        assert code == EXIT_INTERRUPTED
        assert saved == 2, text


def test_a_signal_during_the_last_evaluation_stops_after_the_end_of_the_phase_was_saved(tmp_path: Path) -> None:
    for text, code, _, saved in run_distributed(stopped, 2, str(tmp_path), 1, "late signal"):
        assert code == EXIT_INTERRUPTED
        assert saved == 20, text


SEARCH = configured(
    CONFIG, model={"name": "digits_resnet"}, train={"epochs": 1, "eval_every": 9}, finetune={"epochs": 0},
    checkpoint={"every_steps": 0, "asynchronous": False},
)  # fmt: skip


class Evaluating(Hook):
    """Evaluates in the middle of a search; keeps what the evaluation saw and whether training saw none of it."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.seen: dict[str, Any] = {}

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.position.step != 3:
            return
        before = self.state()
        with trainer.evaluation_weights():
            assert not any(m.training for m in self.net.modules())
            self.seen["evaluated"] = self.state()
        self.seen["mode"] = all(m.training for m in self.net.modules())
        score = trainer.evaluate()
        self.seen |= {"before": before, "after": self.state(), "loss": score.loss}

    def state(self) -> dict[str, Tensor]:
        return {n: t.clone() for n, t in self.net.state_dict().items()}


def evaluating(world: World, folder: str) -> dict[str, Any]:
    run, saved = memory_run(world, Path(folder), SEARCH)
    hook = Evaluating(run.net)
    run.hooks = (hook,)
    run.execute(saved)
    run.close()
    return {**hook.seen, "net": copy.deepcopy(run.net)}


def statistics_of(net: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over the parts of an epoch's first batches of their own statistics, under the given weights."""
    net.load_state_dict(dict(weights))
    net.double().train()
    for layer in batch_norms(net).values():
        layer.momentum = 1.0
    data = MemoryData(single(), parts=Parts(4, 0, 4))
    assert data.steps_per_epoch <= EVALUATION_BATCHES
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for batch in data.train(0):
            for images in batch.images.chunk(4):
                net(images.double())
                found.append({n: b.clone() for n, b in statistics(net).items()})
    return {n: torch.stack([f[n] for f in found]).mean(0) for n in found[0]}


def test_a_search_is_evaluated_with_batch_norm_that_fits_the_mask_and_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    first, second = run_distributed(evaluating, 2, str(tmp_path))
    names = list(statistics(first["net"]))
    assert names
    evaluated, before = first["evaluated"], first["before"]
    for name, tensor in before.items():
        assert torch.equal(first["after"][name], tensor), f"{name} is not what it was"
    assert first["mode"]
    wanted = statistics_of(first["net"], evaluated)
    for name in names:
        assert torch.equal(evaluated[name], second["evaluated"][name])
        torch.testing.assert_close(evaluated[name].double(), wanted[name], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(evaluated[names[-1]], before[names[-1]], rtol=0.1), "the training statistics would do"
    pruned = [n for n, t in evaluated.items() if n.endswith("conv1.weight") and bool((t == 0).any())]
    assert pruned, "it is not the masked network that is evaluated"
    assert first["loss"] == second["loss"]


def names_saved(world: World, folder: str, stage: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything in the checkpoint at the end of a search's first epoch."""
    run, saved = memory_run(world, Path(folder), configured(SEARCH, train={"zero_stage": stage}))
    run.execute(saved)
    run.close()
    (path,) = (Path(folder) / "checkpoints").glob("step-*4")
    return {n: tuple(m.size) for n, m in IndexedReader(path).read_metadata().state_dict_metadata.items()}


def test_a_checkpoint_holds_the_state_by_name_and_the_statistics_of_every_part_for_any_ranks(tmp_path: Path) -> None:
    alone = run_distributed(names_saved, 1, str(tmp_path / "1"), 1)[0]
    assert run_distributed(names_saved, 2, str(tmp_path / "2"), 2)[0] == alone
    assert run_distributed(names_saved, 2, str(tmp_path / "0"), 0)[0] == alone
    net = build_model(SEARCH.model, 4, MemoryData.image_shape, seed=3)
    prunable, weights = prunable_weights(net), dict(net.named_parameters())
    kinds = ("weight", "weight.momentum", "probability", "probability.exp_avg", "probability.exp_avg_sq")
    wanted = {f"prunable.{kind}/{n}": (w.numel(),) for n, w in prunable.items() for kind in kinds}
    others = {n: w for n, w in weights.items() if n not in prunable}
    wanted |= {f"other.{kind}/{n}": (w.numel(),) for n, w in others.items() for kind in kinds[:2]}
    wanted |= {f"part/{n}": (4 * b.numel(),) for n, b in statistics(net).items()}
    wanted |= {f"buffer/{n}.num_batches_tracked": () for n in batch_norms(net)}
    assert alone == wanted


def old_layout(world: World, folder: str) -> tuple[str, bool]:
    """What is said of a checkpoint with an older version's tensors and meta."""
    torch.manual_seed(0)
    net = Net()
    store = CheckpointStore(Path(folder) / "checkpoints", world, asynchronous=False)
    store.save(4, {"weight/conv.weight": torch.zeros(216)}, {"phase": "train", "updates": {"weight": 4}, "hooks": {}})
    saved = store.latest()
    store.close()
    assert isinstance(saved, Saved)
    trainer = build(world, Path(folder), net, MemoryData(world), Bounded())
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(InputError) as caught:
        trainer.resume(saved)
    same = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    trainer.store.close()
    return str(caught.value), same


def test_a_checkpoint_of_the_older_layout_is_refused_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    for text, same in run_distributed(old_layout, 2, str(tmp_path)):
        assert text.startswith("the run's checkpoints were written by an older version")
        assert "--restart" in text
        assert "\n" not in text
        assert same
