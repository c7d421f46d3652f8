"""Powerpropagation: weights that are a power of what is trained, so that large ones grow and small ones stay small.

    theta = f(v),  f(v) = v |v|^(a - 1),  a = mask.power       (Schwarz et al. 2021)

laid around another form, which sees f(v) as its weights, and ranks these. What brings weights back from 0 has no use
for it: f has no slope there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.elementwise import elementwise
from ghostmask.masks.masked import Masked


def powered(form: Reparametrization, power: float) -> Reparametrization:
    """`form` with the power of its state "weight" as its weights; as it is where the power is 1."""
    if power == 1:
        return form
    return PoweredMask(form, power) if isinstance(form, Masked) else Powered(form, power)


class Powered(Reparametrization):
    """State: that of `form`, with v as "weight"; dL/dv = dL/dw a |v|^(a - 1)."""

    def __init__(self, form: Reparametrization, power: float) -> None:
        assert not any((form.noisy, form.differs_in_evaluation, form.whole))
        super().__init__(form.rules, form.rates)
        self.form, self.power = form, power

    def start(self, weight: Tensor, part: Slice) -> State:
        state = self.form.start(weight.copy_(self._power(weight, 1 / self.power)), part)
        self.constrain(state, part, 0)  # a mask that was cut just now saw v
        return state

    def schedule(self, updates: int) -> None:
        self.form.schedule(updates)

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        return self.form.weights(self._seen(state), part, draw)

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        return self.form.evaluation_weights(self._seen(state), part)

    def counted(self, name: str, state: State) -> Tensor:
        return self.form.counted(name, state)

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        found = self.form.gradients(gradient, self._seen(state), part, draw)
        slope = elementwise(lambda v: self.power * v.abs().pow(self.power - 1), state["weight"])
        return {**found, "weight": found["weight"].mul_(slope)}

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        """The form may change anything but "weight"."""
        self.form.constrain(self._seen(state), part, updates)

    def restarts(self, updates: int) -> bool:
        return self.form.restarts(updates)

    def scale(self, state: State, part: Slice, factors: Mapping[str, float]) -> None:
        self.form.scale(state, part, {name: factor ** (1 / self.power) for name, factor in factors.items()})
        self.constrain(state, part, 0)

    def _seen(self, state: State) -> State:
        return {**state, "weight": self._power(state["weight"], self.power)}

    def _power(self, values: Tensor, exponent: float) -> Tensor:
        return elementwise(lambda v: torch.sign(v) * v.abs().pow(exponent), values)


class PoweredMask(Powered, Masked):
    """Around a form with a mask."""

    form: Masked

    def decides(self, updates: int) -> bool:
        return self.form.decides(updates)

    def due(self, part: Slice) -> Sequence[int] | None:
        return self.form.due(part)

    def mask(self, state: State, part: Slice) -> Tensor:
        return self.form.mask(state, part)
