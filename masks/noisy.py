"""Weights under trained noise, with a penalty on what is kept: what Sparse VD and L0 share.

    loss = mean loss under theta(w, a, noise) + penalty(updates) sum_i P(w_i, a_i)

w: state "weight" (SGD); a: a second number for every weight, or for every output channel, that says how noisy it is
(Adam). Noise is a function of (seed, step, sample, index): one draw for each noise sample of a step, shared by the
images of its part of the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.rules import Adam, UpdateRule
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.spans import Spans
from ghostmask.masks.elementwise import chunks, elementwise
from ghostmask.masks.kernels.noise import noise_key, random_words
from ghostmask.masks.masked import FixedMask, Masked
from ghostmask.masks.method import FINETUNE, MaskMethod, Setup
from ghostmask.masks.schedules import LARGEST_NOISE_RATE, LEAST_NOISE_RATE, TRAVEL, noise_rate
from ghostmask.masks.settings import Noisy, number


@dataclass(frozen=True)
class PenalisedSettings(Noisy):
    """What decides the density of a method with a penalty, and how its second tensor is trained."""

    decided_by: ClassVar[str] = "mask.penalty"
    rate_rule: ClassVar[str] = (
        f"{TRAVEL:g} / steps of the search, at least {LEAST_NOISE_RATE:g} and at most {LARGEST_NOISE_RATE:g}"
    )
    """What mask.lr = 0 becomes."""

    penalty: float = number(2e-5, 0)
    """Weight of the penalty in the loss: it decides the density, more of it leaves fewer weights. The default is 1 /
    50,000 images, as CIFAR has; begin with 1 / your number of training images."""
    lr: float = number(0.0, 0)
    """Peak learning rate of Adam on what says how noisy a weight is; 0 = derived from the steps of the search: 20 /
    steps, at least 1e-3 (from 20,000 steps on) and at most 0.1."""

    def rate(self, steps: int) -> float:
        """The peak rate in a search of `steps` steps."""
        return self.lr or noise_rate(steps)


class NoisyWeights(Masked):
    """A method is its functions of single elements: w and a of every weight, and its noise, in float32.

    What is delivered has no noise, and is 0 where `kept` is False.
    """

    noisy = True
    differs_in_evaluation = True
    second: ClassVar[str]
    """The name of the state tensor a."""

    def __init__(self, rule: UpdateRule, rate: float, start: float, penalty: float, ramp: int = 0) -> None:
        """rate: of a, as a multiple of w's; start: what a starts with; ramp: updates in which the penalty grows to
        `penalty`."""
        super().__init__({"weight": rule, self.second: Adam()}, {self.second: rate})
        self.first, self.full, self.ramp = start, penalty, ramp
        self._last: tuple[Draw, Tensor] | None = None
        self.schedule(0)

    @abstractmethod
    def noise(self, uniform: Tensor) -> Tensor:
        """The noise, of float64 numbers that are uniform in (0, 1)."""

    @abstractmethod
    def sampled(self, weight: Tensor, second: Tensor, noise: Tensor) -> Tensor:
        """theta, differentiable in weight and second."""

    @abstractmethod
    def penalty(self, weight: Tensor, second: Tensor) -> Tensor:
        """P, differentiable in both."""

    @abstractmethod
    def kept(self, weight: Tensor, second: Tensor) -> Tensor:
        """Bool: which weights stay."""

    def expected(self, weight: Tensor, second: Tensor) -> Tensor:
        """What is delivered of a weight that stays."""
        return weight

    def start(self, weight: Tensor, part: Slice) -> State:
        self._last = None
        return {"weight": weight, self.second: torch.full_like(weight, self.first)}

    def schedule(self, updates: int) -> None:
        self.strength = self.full * min(1.0, updates / self.ramp if self.ramp else 1.0)

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        return elementwise(self.sampled, state["weight"], self.seconds(state), self._noises(part, draw))

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        seconds = self.seconds(state)
        slopes = torch.empty_like(gradient)
        for chunk, (g, w, a, noise) in chunks([gradient, state["weight"], seconds, self._noises(part, draw)]):
            with torch.enable_grad():
                own = [w.detach().requires_grad_(), a.detach().requires_grad_()]
                outputs = [self.sampled(own[0], own[1], noise), self.penalty(own[0], own[1])]
                found = torch.autograd.grad(outputs, own, [g, torch.full_like(g, self.strength)])
            gradient[chunk], slopes[chunk] = (slope[: chunk.stop - chunk.start] for slope in found)
        return {"weight": gradient, self.second: self.collected(slopes)}

    def mask(self, state: State, part: Slice) -> Tensor:
        return elementwise(self.kept, state["weight"], self.seconds(state)) > 0

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        delivered = elementwise(self.expected, state["weight"], self.seconds(state))
        return torch.where(self.mask(state, part), delivered, 0.0)

    def seconds(self, state: State) -> Tensor:
        """(n,) a of every weight."""
        return state[self.second]

    def collected(self, slopes: Tensor) -> Tensor:
        """Collective: the gradient of the state tensor, of that of `seconds`."""
        return slopes

    def noises(self, part: Slice, draw: Draw) -> Tensor:
        """(n,) float32: the noise of every weight of this rank's slice."""
        device = part.world.device
        return torch.cat([self.drawn(draw, run.first, run.numel, device) for run in part.runs])

    def _noises(self, part: Slice, draw: Draw) -> Tensor:
        """`noises`, of which the last are kept: the gradients of a sample are asked for after its weights."""
        if self._last is None or self._last[0] != draw:
            self._last = (draw, self.noises(part, draw))
        return self._last[1]

    def drawn(self, draw: Draw, first: int, count: int, device: torch.device) -> Tensor:
        """(count,) float32: the noise of numbers first, ..., first + count - 1."""
        key, out = noise_key(draw.seed, draw.step, draw.sample), torch.empty(count, device=device)
        for chunk, _ in chunks([out]):
            words = random_words(key, first + chunk.start, chunk.stop - chunk.start, out.device)
            out[chunk] = elementwise(self.noise, (words.double() + 0.5) * 2.0**-32).float()
        return out


class NoisyChannels(NoisyWeights):
    """One a, and one noise, for all weights of an output channel; a is whole on every rank."""

    def start(self, weight: Tensor, part: Slice) -> State:
        self.spans, self._last = Spans.channels(part), None
        return {"weight": weight, self.second: weight.new_full((self.spans.count,), self.first)}

    def seconds(self, state: State) -> Tensor:
        return self.spans.spread(state[self.second])

    def collected(self, slopes: Tensor) -> Tensor:
        return self.spans.sums(slopes).float()

    def noises(self, part: Slice, draw: Draw) -> Tensor:
        return self.spans.spread(self.drawn(draw, 0, self.spans.count, part.world.device))


class NoisySearch(MaskMethod):
    """Phase "search" trains w and a; its end fixes the mask; phase "finetune" (none: only batch norm is re-estimated)
    trains what stayed, without noise."""

    searches = True
    finetunes = True

    @abstractmethod
    def noisy(self, rate: float, steps: int) -> NoisyWeights:
        """The search's form; rate: of a, as a multiple of w's; steps: of the search."""

    def phases(self) -> tuple[tuple[str, int], ...]:
        return (("search", self.recipe.epochs), (FINETUNE, self.recipe.finetune.epochs))

    def reparametrization(self, phase: Phase) -> Reparametrization:
        if phase.name == FINETUNE:
            return FixedMask(self.rule(), self.found or None)
        steps = phase.epochs * phase.steps_per_epoch
        return self.noisy(self.settings.rate(steps) / self.recipe.optim.lr, steps)

    def begin(self, phase: Phase, data: DataPipeline, say: Callable[[str], None]) -> None:
        if phase.name != FINETUNE and not self.settings.lr:
            steps = phase.epochs * phase.steps_per_epoch
            say(f"mask.lr = {self.settings.rate(steps):.4g}, derived from {steps:,} steps of the search")
        super().begin(phase, data, say)

    def enter(self, phase: Phase) -> Setup:
        return replace(super().enter(phase), passes=1 if phase.name == FINETUNE else self.settings.samples)
