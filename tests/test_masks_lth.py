"""Do lottery-ticket rounds prune what is left, and do they rewind to exactly the state they say?"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_run import CONFIG, configured, memory_run
from torch import Tensor

from ghostmask.engine.batchnorm import statistics
from ghostmask.engine.checkpoint.pieces import Piece
from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.errors import InputError, RunStopped
from ghostmask.engine.hooks import Hook
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World, single
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.run import learning_rate, plan
from ghostmask.masks.masked import present_masks
from ghostmask.masks.method import Recipe
from ghostmask.masks.methods.lth import LotteryTicket, Settings
from ghostmask.masks.scoring.topk import kept_count
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

LTH = configured(
    CONFIG, model={"name": "digits_resnet"}, train={"epochs": 2},
    mask={"method": "lth", "round_fraction": 0.5, "rewind": "0ep"},
)  # fmt: skip


class Recorder(Hook):
    """The state at the start of every phase and after each step, and the phase's masks."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}
        self.starts: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, Tensor]] = []

    def on_start(self, trainer: Trainer) -> None:
        self.starts.append(state_of(trainer))
        self.masks.append({n: m.clone() for n, m in present_masks(trainer.sharded.optimizer).items()})

    def on_step_end(self, trainer: Trainer) -> None:
        self.states[trainer.position.step] = state_of(trainer)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Dense weights, also pruned ones, and batch norm's statistics, the mean over the parts."""
    found: dict[str, Tensor] = {}
    optimizer = trainer.sharded.optimizer
    for state, part in zip(optimizer.states, optimizer.slices, strict=True):
        found |= part.gathered(state["weight"].clone())
    for name, piece in trainer.statistics.entries().items():
        assert isinstance(piece, Piece)
        found[name] = piece.tensor.view(trainer.replicas.parts.total, -1).double().mean(0).float()
    return found


def recorded(world: World, folder: str, config: RunConfig) -> tuple[Any, ...]:
    run, saved = memory_run(world, Path(folder), config)
    recorder = Recorder()
    run.hooks = (recorder,)
    run.execute(saved)
    final = {n: m.clone() for n, m in run.masks().items()}
    run.close()
    return recorder.starts, recorder.masks, final, recorder.states


@pytest.mark.parametrize(("rewind", "step"), [("0ep", None), ("3st", 3)])
def test_every_round_starts_from_the_rewind_point_under_a_smaller_mask(
    rewind: str, step: int | None, tmp_path: Path
) -> None:
    config = configured(LTH, mask={"rewind": rewind})
    starts, masks, final, states = run_distributed(recorded, 1, str(tmp_path), config)[0]
    assert len(starts) == 5  # density 1, 0.5, 0.25, 0.125, 0.1
    point = starts[0] if step is None else states[step]
    for start in starts[1:]:
        assert [n for n, t in point.items() if not torch.equal(start[n], t)] == []
    total = sum(m.numel() for m in final.values())
    assert [sum(int(m.sum()) for m in round_.values()) for round_ in masks] == [
        kept_count(d, total) for d in (1.0, 0.5, 0.25, 0.125, 0.1)
    ]
    for before, after in zip(masks, [*masks[1:], final], strict=True):
        assert not any(bool((after[n] & ~before[n]).any()) for n in after), "a pruned weight returned"
    ends = [states[8 * (i + 1)] for i in range(4)]
    for end, before, after in zip(ends, masks, masks[1:], strict=False):
        kept = torch.cat([end[n][after[n]].abs() for n in after])
        pruned = torch.cat([end[n][before[n] & ~after[n]].abs() for n in after])
        assert kept.min() >= pruned.max(), "not the smallest weights of the round's end were pruned"


def lottery(**settings: Any) -> LotteryTicket:
    net = build_model(ModelConfig(name="conv4"), 4, (3, 8, 8), seed=0)
    recipe = Recipe(OptimConfig(), FinetuneConfig(), epochs=2, seed=0)
    return LotteryTicket(Settings(method="lth", **settings), net, recipe, single())


def test_rounds_prune_a_fifth_of_what_is_left_until_the_density_is_reached() -> None:
    assert lottery(density=0.5).densities() == pytest.approx([1, 0.8, 0.64, 0.512, 0.5])
    assert lottery(density=0.64).densities() == pytest.approx([1, 0.8, 0.64])
    assert lottery(density=1.0).densities() == [1.0]
    assert len(lottery(density=0.05).densities()) == 15
    assert lottery(density=0.5).phases()[-1] == ("round4", 2)


def test_every_round_has_the_whole_learning_rate_schedule() -> None:
    config = configured(LTH, optim={"warmup": "1ep"})
    first, second = (learning_rate(config, phase) for phase in plan(lottery(density=0.8), 4))
    assert first == second
    assert first.warmup == 4


def test_a_rewind_point_beyond_the_round_is_refused() -> None:
    short = configured(LTH, train={"epochs": 2})
    with pytest.raises(InputError, match=r"mask\.rewind = '9st': is 9 steps, a round has 8; give at most 8st, or"):
        LotteryTicket.check_steps(replace(LTH.mask, rewind="9st"), short, 4)
    with pytest.raises(InputError, match=r"mask\.rewind = '0\.1ep': rounds to no step"):
        LotteryTicket.check_steps(replace(LTH.mask, rewind="0.1ep"), short, 4)
    with pytest.raises(InputError, match=r"mask\.round_fraction = 1e-09: takes more than 1000 .* least 0\.0023"):
        Settings(density=0.1, round_fraction=1e-9)


def exported(world: World, folder: str, config: RunConfig) -> tuple[dict[str, Tensor], ...]:
    """What `ghostmask export` delivers of an unfinished run: its masks and network."""
    run, saved = memory_run(world, Path(folder), config)
    assert saved is not None
    assert saved.meta["phase"] == "round1"
    run.execute(saved, train=False)
    masks = {n: m.clone() for n, m in run.masks().items()}
    tensors = {n: t.clone() for n, t in [*run.net.named_parameters(), *statistics(run.net).items()]}
    run.close()
    return masks, {n: t.detach() for n, t in tensors.items()}


def stopped(world: World, folder: str, config: RunConfig, step: int) -> dict[str, Tensor]:
    """The state at `step`, where a signal stops the run after saving."""
    run, _ = memory_run(world, Path(folder), config)
    recorder = Recorder()
    run.hooks = (recorder, SignalAt(step))
    with pytest.raises(RunStopped):
        run.execute(None)
    run.close()
    return recorder.states[step]


class SignalAt(Hook):
    """SIGTERM to this process, as a scheduler sends it, at a step of the run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.position.step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unfinished_run_exports_the_network_and_the_mask_of_its_present_round(ranks: int, tmp_path: Path) -> None:
    live = run_distributed(stopped, 1, str(tmp_path), LTH, 13)[0]
    masks, found = run_distributed(exported, ranks, str(tmp_path), LTH)[0]
    total = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == kept_count(0.5, total)
    for name, tensor in live.items():
        wanted = torch.where(masks[name], tensor, 0.0) if name in masks else tensor
        assert torch.equal(found[name], wanted), f"{name} was rewound, or trained on"
