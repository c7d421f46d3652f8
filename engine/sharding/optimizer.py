"""The optimizer whose parameters are functions of sharded state: chain rule, update rules, constraint, new parameters.

       every rank                                     a slice of each group on its owner
batches -> the plain network -> loss
            ^                    | backward
            | publish            v gradient            (placement: whole, or shared out by DeepSpeed)
    [ parameters ]  <-------  step():
                                1  g = dL/d(parameters) of my slice
                                2  gradients of my state             reparametrization.gradients, kernels or autograd
                                   averaged over the noise groups    [all-reduce across the groups]
                                3  joint norm, clipping, rules       [all-reduce of one number]
                                4  constraint                        [collective]
                                   now and then, instead of 3 and 4: reparametrization.replacement
                                5  parameters of the next step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ghostmask.engine.sharding.average import AVERAGE, delivered, follow
from ghostmask.engine.sharding.placement import ParameterGroup, Placement, WholePlacement
from ghostmask.engine.sharding.reparametrization import Draw, State
from ghostmask.engine.sharding.rules import Scale
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.tree import tree_all_reduce
from ghostmask.engine.world import World, single

NORM_CHUNK = 1 << 18
"""Elements of a norm that are in float64 at a time on the CPU: they stay in its cache."""


@dataclass(frozen=True)
class Sampling:
    """Which noise the optimizer draws: by seed, global step and sample.

    first_step: global number of the step that update 0 belongs to. samples: of each step, those that this rank takes,
    one `step()` call each; the state's gradients are averaged over them, and over the ranks `across`, which hold the
    same slices but take other samples; order: these ranks by their samples.
    """

    seed: int = 0
    first_step: int = 0
    samples: tuple[int, ...] = (0,)
    across: World | None = None
    order: tuple[int, ...] = (0,)


class ShardedOptimizer(torch.optim.Optimizer):
    """Trains groups of parameters through their reparametrizations; keeps to torch.optim.Optimizer's conventions.

    Learning-rate schedulers act on `param_groups`. As in Schedule-Free, the parameters hold the weights that are
    trained with after `train()` and those that would be delivered now after `eval()`: call both where the network's are
    called.

    clip: largest joint norm of the state's gradients over all groups, 0 = none. An update whose gradients are not
    finite changes nothing; `finite` tells.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        clip: float = 0.0,
        sampling: Sampling | None = None,
        placement: Callable[[Sequence[ParameterGroup]], Placement] | None = WholePlacement,
    ) -> None:
        """placement: where parameters and gradients lie; None = `place` is called later."""
        self.groups, self.clip, self.sampling = list(groups), clip, sampling or Sampling()
        super().__init__(
            [{"params": list(g.parameters.values()), "name": g.name, "lr": g.lr} for g in self.groups], {}
        )  # fmt: skip
        self.updates = 0
        self.finite = torch.ones(())
        """() float32, 1 where the last update's gradients were finite."""
        self.norms: dict[str, Tensor] = {}
        """Norm of the last update's gradient of each trained state tensor, "group.state" -> () float64, before
        clipping."""
        self.divisor = torch.ones(())
        """() float32: what clipping divided the last update's gradients by."""
        self._cycle = 0
        self._evaluating = False
        self._sums: list[_Sums] = []
        if placement is not None:
            self.place(placement(self.groups))

    def place(self, placement: Placement) -> None:
        """Collective: make the state from the parameters' values, and the first parameters from the state."""
        self.placement = placement
        self.slices: Sequence[Slice] = placement.slices
        self.states: list[State] = []
        with torch.no_grad():
            for index, group in enumerate(self.groups):
                form = group.reparametrization
                state = form.start(placement.initial(index), self.slices[index])
                for name, rule in form.rules.items():
                    state |= {f"{name}.{buffer}": torch.zeros_like(state[name]) for buffer in rule.buffers}
                if group.average:
                    state[AVERAGE] = state["weight"].clone()
                self.states.append(state)
        self.refresh()

    @property
    def draw(self) -> Draw:
        """The noise of the parameters that stand in the network while training."""
        taken = self.sampling
        return Draw(taken.seed, taken.first_step + self.updates, taken.samples[self._cycle])

    @property
    def differs_in_evaluation(self) -> bool:
        """Whether `eval()` changes the parameters."""
        return any(g.differs_in_evaluation for g in self.groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Collective: take the gradients that stand in the parameters; with the last sample of a step, update.

        Afterwards the parameters are those of the next sample. closure: computes loss and gradients first; what it
        returns is returned. Raises RuntimeError between `eval()` and `train()` where these change the parameters: the
        gradients are of others than those that are trained.
        """
        if self._evaluating and self.differs_in_evaluation:
            raise RuntimeError("step() after eval(): call the optimizer's train() first, as the network's")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._collect()
        self._cycle = (self._cycle + 1) % len(self.sampling.samples)
        if self._cycle == 0:
            self._update()
        self._write()
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """Collective: make the parameters anew from the state, after it was changed from outside."""
        for group in self.groups:
            group.reparametrization.schedule(self.updates)
        self._write()

    @torch.no_grad()
    def eval(self) -> None:
        """Collective: the parameters become those of the network that would be delivered now."""
        if not self._evaluating:
            self._evaluating = True
            if self.differs_in_evaluation:
                self._write()

    @torch.no_grad()
    def train(self) -> None:
        """Collective: the parameters become those to train with, as they were before `eval()`, bit for bit."""
        if self._evaluating:
            self._evaluating = False
            if self.differs_in_evaluation:
                self._write()

    @torch.no_grad()
    def scale(self, factors: Mapping[str, float]) -> None:
        """Collective: multiply parameters by a factor each, by name, through their state; averages begin anew."""
        for group, state, part in zip(self.groups, self.states, self.slices, strict=True):
            group.reparametrization.scale(state, part, factors)
        self.begin_averages()
        self.refresh()

    @torch.no_grad()
    def begin_averages(self) -> None:
        """The averages, where there are any, are what they are made of."""
        for group, state in zip(self.groups, self.states, strict=True):
            if group.average:
                state[AVERAGE].copy_(state["weight"])

    @torch.no_grad()
    def give_back(self) -> None:
        """Collective: the parameters become plain float32 tensors of their own, with the evaluation's values.

        The optimizer has no hold on them any more.
        """
        for group, state, part in zip(self.groups, self.states, self.slices, strict=True):
            whole = part.gathered(group.reparametrization.evaluation_weights(delivered(state), part))
            for name, parameter in group.parameters.items():
                parameter.data, parameter.grad = whole[name].contiguous(), None

    @torch.no_grad()
    def adopt(self, other: ShardedOptimizer) -> None:
        """Collective: take over the state of the groups that `other` has too, in the same slices, and its counts."""
        known = {g.name: state for g, state in zip(other.groups, other.states, strict=True)}
        for group, state in zip(self.groups, self.states, strict=True):
            for name, tensor in state.items():
                tensor.copy_(known[group.name][name])
        self.updates = other.updates
        self.refresh()

    def group(self, name: str) -> tuple[ParameterGroup, State, Slice]:
        """A group by name, with the state and the slice that this rank holds of it."""
        index = [g.name for g in self.groups].index(name)
        return self.groups[index], self.states[index], self.slices[index]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs: this rank's state, the counts, the learning rates.

        For the same slices; checkpoints of the engine are keyed by parameter name and fit any number of ranks.
        """
        return {
            "updates": self.updates,
            "state": {g.name: dict(state) for g, state in zip(self.groups, self.states, strict=True)},
            "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Collective: take back what `state_dict` gave. Raises ValueError where groups, tensors or sizes differ."""
        mine = {g.name: state for g, state in zip(self.groups, self.states, strict=True)}
        for name in [*mine, *state_dict["state"]]:
            here, given = (states.get(name, {}) for states in (mine, state_dict["state"]))
            if {n: t.shape for n, t in given.items()} != {n: t.shape for n, t in here.items()}:
                raise ValueError(
                    f"group {name}: the saved state is not that of these parameters, method and number of ranks; "
                    "build the optimizer as it was when the state was saved"
                )
        for group, state in zip(self.groups, self.states, strict=True):
            for name, tensor in state.items():
                tensor.copy_(state_dict["state"][group.name][name])
        for settings, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            settings.update(saved)
        self.updates, self._cycle = int(state_dict["updates"]), 0
        self.refresh()

    def _collect(self) -> None:
        """Put the chain rule's result of one sample on the step's stacks, where equal numbers of samples are added."""
        if self._cycle == 0:
            self._sums = [_Sums() for _ in self.groups]
        several = len(self.sampling.samples) > 1
        for index, (group, state, part) in enumerate(zip(self.groups, self.states, self.slices, strict=True)):
            with record_function("chain rule"):
                gradient = self.placement.gradient(index)
                found = group.reparametrization.gradients(gradient, state, part, self.draw)
            # With several samples the gradient's own memory is filled again by the next one.
            kept = {n: g.clone() for n, g in found.items()} if several else found
            self._sums[index].add(kept)

    def _update(self) -> None:
        found = [sums.total() for sums in self._sums]
        self._sums = []
        self._average(found)
        number, forms = self.updates + 1, [g.reparametrization for g in self.groups]
        replaced = any(form.replaces(number) for form in forms)
        scale = self._clipping(found, keep=replaced)
        if (self.finite.device.type == "cpu" or replaced) and not self.finite:
            return  # elsewhere the rules skip it by themselves, and nobody waits for the answer
        rates = {g["name"]: g["lr"] for g in self.param_groups}
        for group, state, part, gradients in zip(self.groups, self.states, self.slices, found, strict=True):
            if not replaced:
                self._move(group, state, part, gradients, rates[group.name], scale)
            elif group.reparametrization.replaces(number):
                with record_function("constraint"):
                    group.reparametrization.replacement(state, gradients, part, number)
            if group.average:
                follow(state[AVERAGE], state["weight"], group.average, self.updates)
        if any(form.restarts(number) for form in forms):
            for state in self.states:
                for name in state:
                    if name.endswith(".momentum"):
                        state[name].zero_()
        self.updates += 1
        for form in forms:
            form.schedule(self.updates)

    def _move(
        self, group: ParameterGroup, state: State, part: Slice, gradients: State, rate: float, scale: Scale
    ) -> None:  # fmt: skip
        form = group.reparametrization
        with record_function("optimizer"):
            for name, rule in form.rules.items():
                buffers = [state[f"{name}.{buffer}"] for buffer in rule.buffers]
                lr = rate * form.rates.get(name, 1.0)
                counted, left = partial(form.counted, name, state), scale
                if name not in form.whole:
                    left = rule.adapt(state[name], gradients[name], counted, part, scale)
                rule.update(state[name], gradients[name], buffers, lr, self.updates, left)
        with record_function("constraint"):
            form.constrain(state, part, self.updates + 1)

    def _average(self, found: list[State]) -> None:
        """Over the samples of this rank, and over the noise groups."""
        across = self.sampling.across or single()
        count = len(self.sampling.samples) * across.size
        if count == 1:
            return
        for gradients in found:
            for g in gradients.values():
                tree_all_reduce(across, g, self.sampling.order).div_(count)

    def _clipping(self, found: list[State], *, keep: bool = False) -> Scale:
        """Looks whether the gradients are finite; keep: of norms and divisor, what the last update had."""
        names, squares = [], []
        first = self.slices[0].world.rank == 0
        for group, gradients in zip(self.groups, found, strict=True):
            for name, g in gradients.items():
                names.append(f"{group.name}.{name}")
                counts = first or name not in group.reparametrization.whole
                squares.append(squared_norm(g if counts else g[:0]))
        total = self.slices[0].world.all_reduce(torch.stack(squares))
        if self.sampling.across is not None:
            # Equal on all groups but for the order of additions; they must stay equal bit for bit.
            total = self.sampling.across.all_reduce(total, dist.ReduceOp.MAX)
        norm = total.sum().sqrt()
        self.finite = norm.isfinite().float()
        if not keep:
            self.norms = dict(zip(names, total.sqrt().unbind(), strict=True))
            self.divisor = (norm / self.clip).clamp(min=1.0).float() if self.clip else torch.ones_like(self.finite)
        return Scale(torch.where(self.finite > 0, self.divisor, 1.0), 1.0 - self.finite)

    def _write(self) -> None:
        for index, (group, state, part) in enumerate(zip(self.groups, self.states, self.slices, strict=True)):
            form, outputs = group.reparametrization, self.placement.outputs(index)
            with record_function("parameters"):
                if self._evaluating and group.differs_in_evaluation:
                    values = form.evaluation_weights(delivered(state), part)
                    for run, out in outputs:
                        out.copy_(values[run.start : run.start + run.numel])
                else:
                    form.write(state, part, self.draw, outputs)
        self.placement.publish()


class _Sums:
    """Gradients of one sample after the other, added up in the order of a tree (see `tree`)."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, State]] = []

    def add(self, gradients: State) -> None:
        count, top = 1, gradients
        while self._stack and self._stack[-1][0] == count:
            count, below = 2 * count, self._stack.pop()[1]
            top = {name: below[name].add_(g) for name, g in top.items()}
        self._stack.append((count, top))

    def total(self) -> State:
        _, top = self._stack.pop()
        while self._stack:
            _, below = self._stack.pop()
            top = {name: below[name].add_(g) for name, g in top.items()}
        return top


def squared_norm(vector: Tensor) -> Tensor:
    """() float64: the sum of squares of a float32 vector, in float64: it does not depend on how the vector is cut."""
    if vector.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
        return norm.square()
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.split(vector, NORM_CHUNK):
        wide = part.double()
        total += torch.dot(wide, wide)
    return total
