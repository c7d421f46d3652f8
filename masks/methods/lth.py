"""lth: rounds of training, each followed by pruning the smallest weights and rewinding the rest (lottery tickets)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghostmask.engine.config import require
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.hooks import Hook
from ghostmask.engine.position import Duration, Phase, require_steps
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Plain, Reparametrization, State
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.masked import PRUNABLE, FixedMask
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.power import Powered
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.masks.settings import Protecting, WithPower, number

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer

MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Settings(Protecting, WithPower):
    """lth."""

    round_fraction: float = number(0.2, 0, 0.99, above=True)
    """Share of the remaining weights that each round prunes."""
    rewind: str = "0ep"
    """How far into the first round's training the weights are rewound, such as 500st or 2ep; 0ep = to init."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Duration.parse(self.rewind, "mask.rewind")
        enough = 1 - self.density ** (1 / MOST_ROUNDS)
        require(
            self.round_fraction >= enough,
            "mask.round_fraction", self.round_fraction,
            f"takes more than {MOST_ROUNDS} rounds to mask.density = {self.density:g}; give at least {enough:.2g}",
        )  # fmt: skip


class LotteryTicket(MaskMethod):
    """Iterative magnitude pruning with rewinding (Frankle & Carbin 2019; Frankle et al. 2020).

        round0   dense            -> prune 20 % -> rewind
        round1   density 0.8      -> prune 20 % -> rewind
        ...
        roundR   the density asked for; its weights are the result

    Each round is a phase of train.epochs under the whole learning-rate schedule. The rewind point, weights and batch
    norm after mask.rewind of round 0 (0: the initialisation), is part of the sharded state and of every checkpoint.
    """

    Settings = Settings
    searches = True
    paper = (
        'Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", https://arxiv.org/abs/1803.03635; rewinding: '
        'Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", https://arxiv.org/abs/1912.05671'
    )
    aliases = ("imp", "iterative", "lottery", "lottery_ticket", "ticket", "rewind")
    every_phase_has_a_result = True
    points: Mapping[str, Tensor] = MappingProxyType({})
    """Group name -> this rank's slice of the weights that rounds are rewound to, once there are any."""
    point: RewindPoint | None = None

    @classmethod
    def check_steps(cls, settings: Any, run: Any, steps_per_epoch: int) -> None:
        total = run.train.epochs * steps_per_epoch
        require_steps("mask.rewind", settings.rewind, steps_per_epoch, total, "a round has")

    def phases(self) -> tuple[tuple[str, int], ...]:
        return tuple((f"round{i}", self.recipe.epochs) for i in range(len(self.densities())))

    def densities(self) -> list[float]:
        """The density of each round: 1, 1 - f, (1 - f)^2, ..., mask.density, with f = mask.round_fraction."""
        densities, left = [], 1.0
        while left > self.settings.density * (1 + 1e-9):
            densities.append(left)
            left *= 1 - self.settings.round_fraction
        return [*densities, self.settings.density]

    def begin(self, phase: Phase, data: DataPipeline, say: Callable[[str], None]) -> None:
        if self.point is not None:
            self.point.rewind()

    def reparametrization(self, phase: Phase) -> Reparametrization:
        return RewindingMask(self.rule(), self.found or None, self._budget(phase).counts(self._sizes()))

    def _budget(self, phase: Phase, later: int = 0) -> Budget:
        """What the mask of a round, or of one so many rounds later, is held to."""
        density = self.densities()[int(phase.name.removeprefix("round")) + later]
        return self.budget(density)

    def _sizes(self) -> list[int]:
        return [w.numel() for w in self.weights.values()]

    def groups(self, form: Reparametrization, lr: float) -> list[ParameterGroup]:
        groups = []
        for group in super().groups(form, lr):
            made = form if group.name == PRUNABLE else RewindingPlain({"weight": self.rule()})
            inner = made.form if isinstance(made, Powered) else made
            assert isinstance(inner, Rewinding)
            inner.point = self.points.get(group.name)
            groups.append(replace(group, reparametrization=made))
        return groups

    def hooks(self, phase: Phase, form: Reparametrization) -> Sequence[Hook]:
        rewind = Duration.parse(self.settings.rewind).steps(phase.steps_per_epoch)
        self.point = self.point or RewindPoint(self.net)
        self.point.step = rewind if phase.first_epoch == 0 else 0
        return (*super().hooks(phase, form), self.point)

    def leave(self, trainer: Trainer) -> None:
        super().leave(trainer)
        optimizer = trainer.sharded.optimizer
        self.points = {
            g.name: s["rewind"] for g, s in zip(optimizer.groups, optimizer.states, strict=True) if "rewind" in s
        }
        if trainer.phase.name == self.phases()[-1][0]:
            return
        group, state, part = optimizer.group(PRUNABLE)
        budget = self._budget(trainer.phase, 1)
        seen = group.reparametrization.evaluation_weights(state, part)
        masks = part.gathered(largest(part, seen.abs(), budget, among=state["mask"]))
        self.settle(masks, trainer.reporter.progress.message, budget.counts(self._sizes()))


class Rewinding(Reparametrization):
    """Weights that start at the rewind point, where there is one yet, and keep it in their state."""

    point: Tensor | None = None

    def start(self, weight: Tensor, part: Slice) -> State:
        point = weight.clone() if self.point is None else self.point
        return super().start(weight.copy_(point), part) | {"rewind": point}


class RewindingMask(Rewinding, FixedMask):
    """Under a fixed mask."""


class RewindingPlain(Rewinding, Plain):
    """Never pruned."""


class RewindPoint(Hook):
    """Collective: takes the rewind point when `step` updates of the phase are done (0: it was taken before)."""

    name = "rewind"

    def __init__(self, net: nn.Module) -> None:
        self.net, self.step = net, 0
        self.buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def on_step_end(self, trainer: Trainer) -> None:
        if not self.step or trainer.num_updates != self.step:
            return
        trainer.statistics.average(trainer.world)  # the rewind point is one, batch norm's statistics are each part's
        for name, buffer in self.net.named_buffers():
            self.buffers[name].copy_(buffer)
        for state in trainer.sharded.optimizer.states:
            if "rewind" in state:
                state["rewind"].copy_(state["weight"])

    def rewind(self) -> None:
        """Bring the network's buffers back; its weights are brought back by their state."""
        with torch.no_grad():
            for name, buffer in self.net.named_buffers():
                buffer.copy_(self.buffers[name])

    def tensors(self) -> Mapping[str, Tensor]:
        return self.buffers
