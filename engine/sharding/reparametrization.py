"""What a group of parameters is a function of: its state, how that moves, and what it is held to.

    state  --weights(draw)-->  the parameters that the network computes with
           <--gradients-----   dL/d(parameters)              the chain rule, on this rank's slice
           <--rules---------   SGD, Adam: one for each trained state tensor
           <--constrain-----   whatever must hold afterwards: a projection, a new mask; all ranks together

All tensors are 1-D, (n,): this rank's slice of the group (see `slices`); but for `whole` ones, which hold something for
each layer or channel, say, equal on every rank. A subclass is a function of a few lines:

    class Squared(Reparametrization):
        def weights(self, state, part, draw):
            return state["weight"] * state["weight"].abs()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.engine.sharding.slices import Run, Slice

State = dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """Which noise: of the run's seed, the global number of the step, and the sample's number in it."""

    seed: int
    step: int
    sample: int


class Reparametrization:
    """The parameters as one differentiable function of their state; here: the parameters are their state.

    rules: state tensor -> how it moves; what has no rule is not trained. rates: its learning rate as a multiple of the
    group's, 1 where it is not named.
    """

    noisy: ClassVar[bool] = False
    """Whether `weights` depends on the draw: noise groups and several samples per step mean something then."""
    differs_in_evaluation: ClassVar[bool] = False
    """Whether `evaluation_weights` are others than those trained with."""
    whole: ClassVar[tuple[str, ...]] = ()
    """State tensors, (m,), that are not this rank's slice but the same on every rank. `gradients` gives theirs summed
    over all ranks' elements (`spans`), and their rules look at nothing but each element's numbers."""

    def __init__(self, rules: Mapping[str, UpdateRule], rates: Mapping[str, float] | None = None) -> None:
        self.rules, self.rates = dict(rules), dict(rates or {})

    def start(self, weight: Tensor, part: Slice) -> State:
        """Every state tensor, trained ones float32; weight: (n,) float32, the parameters' initial values, to keep."""
        return {"weight": weight}

    def schedule(self, updates: int) -> None:
        """Called before update number `updates` of the group's training, from 0, is computed: what changes over
        time."""

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        """(n,) the parameters, differentiable in the trained state tensors."""
        return state["weight"]

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        """(n,) float32: the parameters of the network that would be delivered now. Collective."""
        return self.weights(state, part, Draw(0, 0, 0))

    def counted(self, name: str, state: State) -> Tensor:
        """(n,) a trained state tensor, with 0 for elements that the network does not see."""
        return state[name]

    def write(self, state: State, part: Slice, draw: Draw, outputs: list[tuple[Run, Tensor]]) -> None:
        """Fill the runs' outputs, of any float type, with `weights`; to be overridden where a kernel does it at
        once."""
        values = self.weights(state, part, draw)
        for run, out in outputs:
            out.copy_(values[run.start : run.start + run.numel])

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        """dL/d(state), (n,) float32 each, of the trained tensors from dL/d(parameters); may overwrite `gradient`.

        By autograd through `weights`, unless there is something faster.
        """
        with torch.enable_grad():
            inputs = {name: state[name].detach().requires_grad_() for name in self.rules}
            values = self.weights({**state, **inputs}, part, draw)
            found = torch.autograd.grad(
                values, list(inputs.values()), gradient, materialize_grads=True, allow_unused=True
            )
        return dict(zip(inputs, found, strict=True))

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        """Collective: after update number `updates`, counted from 1: bring the state back to what it must satisfy."""

    def replaces(self, updates: int) -> bool:
        """Whether update number `updates`, counted from 1, is left out, in all groups, and `replacement` made of this
        one: no rule moves anything. Equal on every rank, and known to the host."""
        return False

    def replacement(self, state: State, gradients: State, part: Slice, updates: int) -> None:
        """Collective: what is done in the place of update number `updates`. gradients: what `gradients` gave, averaged
        over samples and noise groups, not clipped."""

    def restarts(self, updates: int) -> bool:
        """Whether the momentum of all groups is 0 after update number `updates`, counted from 1."""
        return False

    def scale(self, state: State, part: Slice, factors: Mapping[str, float]) -> None:
        """Multiply the parameters by a factor each, by name; those not named stay."""
        for s in part.segments:
            state["weight"][s.start : s.start + s.numel] *= factors.get(s.name, 1.0)


class Plain(Reparametrization):
    """Parameters that are their own state."""

    def write(self, state: State, part: Slice, draw: Draw, outputs: list[tuple[Run, Tensor]]) -> None:
        for run, out in outputs:
            own = state["weight"][run.start : run.start + run.numel]
            if not is_alias(own, out):  # one rank, float32: state and parameters share their memory
                out.copy_(own)

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        return {"weight": gradient}


def is_alias(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share their memory."""
    alias: bool = torch._C._is_alias_of(one, other)  # type: ignore[attr-defined]
    return alias
