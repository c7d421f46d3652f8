"""Masks whose weights move while they train: the smallest are dropped, as many are grown elsewhere (RigL, SET).

Every update_every updates of the first end_fraction of training, of each layer's k kept weights
    d = floor(k drop_fraction / 2 (1 + cos(pi t / t_end)))
with the smallest |w| are dropped, and d are grown where a method's `promise` is largest, among all that are not kept
then: a dropped one may come back, and has its value still. New ones start at 0, and so does their momentum. An exchange
takes the place of an optimizer step: nothing else moves (Evci et al. 2020, algorithm 1; the first at t = update_every).

With N:M every block of M neighbouring input channels keeps N throughout: d are dropped from the whole layer, and every
block grows as many as it dropped, where the promise is largest in it. Kernels move as weights do, by their means.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.errors import bad_value
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.drawn import Allocated, Drawn
from ghostmask.masks.masked import ChangingMask
from ghostmask.masks.scoring.topk import Units, largest_of_layers
from ghostmask.masks.settings import choice, granularity, number, shortest
from ghostmask.masks.units.blocks import Blocks, Kernels

NO_CHANNELS = (
    "no gradient reaches a channel that is removed, so none says which to grow; use kernel, or mask.method=gmp"
)


@dataclass(frozen=True)
class Regrowing(Allocated):
    """A method that moves the kept weights of each layer."""

    granularity: str = granularity({"channel": NO_CHANNELS})
    """What moves: weight, kernel (of a convolution, between one input and one output channel), or weights in N:M like
    2:4 (every block of M neighbouring input channels keeps N throughout; that decides each layer's density)."""
    allocation: str = choice("erk", "er", "uniform")
    """How many weights each layer keeps throughout: by the layers' shapes (erk counts kernel sizes, er does not), or
    uniform: all of the first layer, and the same density in the others."""
    update_every: int = number(100, 2)
    """Optimizer steps between exchanges; an exchange takes the place of a step."""
    end_fraction: float = number(0.75, 0, 1, above=True)
    """Where exchanges end, as a fraction of train.epochs."""
    drop_fraction: float = number(0.3, 0, 1, above=True)
    """Share of each layer's weights that the first exchange drops; falls along a cosine to 0 at end_fraction."""

    def last(self, steps: int) -> int:
        """The update, of `steps`, before which exchanges end."""
        return round(self.end_fraction * steps)


@dataclass(frozen=True)
class Exchanges:
    """When weights move, and how many: every `every` updates before update number `end`, counted from 1."""

    every: int
    end: int
    drop: float

    def at(self, updates: int) -> bool:
        """Whether update number `updates` is an exchange."""
        return updates % self.every == 0 and 0 < updates < self.end

    def dropped(self, kept: Sequence[int], updates: int) -> list[int]:
        """How many weights (or kernels) each layer drops then, of those that it keeps."""
        share = self.drop / 2 * (1 + math.cos(math.pi * updates / self.end))
        return [math.floor(share * count) for count in kept]


class Regrown(ChangingMask):
    """theta = w m; m moves. A method is its `promise`."""

    growing: ClassVar[bool]
    """Whether `promise` looks at dL/d(theta) of all positions, pruned ones too."""

    def __init__(
        self, rule: UpdateRule, masks: Mapping[str, Tensor] | None, kept: Sequence[int], exchanges: Exchanges,
        seed: int, units: Units | None = None,
    ) -> None:  # fmt: skip
        """kept: weights of each layer; seed: of ties, and of what is random; units: what `masks` are made of."""
        super().__init__(rule, masks, kept)
        self.units, self.exchanges, self.seed, self.updates = units, exchanges, seed, 0
        self.layer_counts = list(kept)
        if isinstance(units, Kernels):
            self.layer_counts = units.numbers(kept)

    @abstractmethod
    def promise(self, gradient: Tensor, part: Slice, updates: int) -> Tensor:
        """(n,) how much is hoped for from each weight, larger = grown; gradient: dL/d(theta), mean over all images."""

    def schedule(self, updates: int) -> None:
        self.updates = updates

    def decides(self, updates: int) -> bool:
        return self.exchanges.at(updates)

    def replaces(self, updates: int) -> bool:
        return self.exchanges.at(updates)

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        if self.growing and self.replaces(self.updates + 1):
            return {"weight": gradient}
        return super().gradients(gradient, state, part, draw)

    def replacement(self, state: State, gradients: State, part: Slice, updates: int) -> None:
        moving = self.exchanges.dropped(self.layer_counts, updates)
        staying = [k - d for k, d in zip(self.layer_counts, moving, strict=True)]
        largest = self.units.largest_of_layers if isinstance(self.units, Kernels) else largest_of_layers
        stay = largest(part, state["weight"].abs(), staying, self.seed, among=state["mask"])
        promise = self.promise(gradients["weight"], part, updates)
        if isinstance(self.units, Blocks):
            mask = self.units.largest(part, torch.where(stay, torch.inf, promise), self.units.budget(self.seed))
        else:
            mask = stay | largest(part, promise, moving, self.seed, among=~stay)
        self.lay(state, mask)


class RegrowingMethod(Drawn):
    """Phase "train" under a mask that is drawn at random and moves; a method is its form."""

    Settings = Regrowing
    searches = True
    first_dense = True
    form: ClassVar[type[Regrown]]

    @classmethod
    def check_steps(cls, settings: Any, run: Any, steps_per_epoch: int) -> None:
        def moves(epochs: int) -> bool:
            return settings.update_every < settings.last(epochs * steps_per_epoch)  # type: ignore[no-any-return]

        epochs = run.train.epochs
        if settings.density == 1 or moves(epochs):
            return
        end = settings.last(epochs * steps_per_epoch)
        why = f"no weight moves before update {end}, where mask.end_fraction = {settings.end_fraction:g} ends that"
        enough = shortest(moves)
        fix = f"give at most {end - 1}" if end > 1 else ""
        longer = f"train.epochs={enough}" if enough else ""
        raise bad_value(
            "mask.update_every", settings.update_every, f"{why}; {', or '.join(filter(None, (fix, longer)))}"
        )

    def begin(self, phase: Phase, data: DataPipeline, say: Callable[[str], None]) -> None:
        self.settle(self.drawn(), say, self.counts())

    def reparametrization(self, phase: Phase) -> Reparametrization:
        s = self.settings
        exchanges = Exchanges(s.update_every, s.last(phase.epochs * phase.steps_per_epoch), s.drop_fraction)
        return self.form(self.rule(), self.found or None, self.counts(), exchanges, self.recipe.seed, self.units)
