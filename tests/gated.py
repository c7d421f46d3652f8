"""A small network whose weights are a gated function of their state, and the same training written out in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ghostmask.engine.sharding.optimizer import ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Draw, Plain, Reparametrization, State
from ghostmask.engine.sharding.rules import Adam, Sgd, UpdateRule
from ghostmask.engine.sharding.slices import Slice


class Gated(Reparametrization):
    """theta = w |w| sigmoid(gate) + noise g, whose state has an untrained tensor too."""

    noisy = True
    differs_in_evaluation = True

    def __init__(self, rules: Mapping[str, UpdateRule], rates: Mapping[str, float] | None = None) -> None:
        super().__init__(rules, rates)
        self.updates, self.constrained = 0, list[int]()

    def start(self, weight: Tensor, part: Slice) -> State:
        return {"weight": weight, "gate": torch.full_like(weight, 0.5), "ones": torch.ones_like(weight)}

    def schedule(self, updates: int) -> None:
        self.updates = updates

    def noise(self, numel: int, draw: Draw) -> Tensor:
        key = 1000 * draw.seed + 10 * draw.step + draw.sample
        return 0.1 * torch.randn(numel, generator=torch.Generator().manual_seed(key))

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        w, gate = state["weight"], state["gate"]
        return w * w.abs() * gate.sigmoid() * state["ones"] + self.noise(len(w), draw) * gate

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        return state["weight"] * state["weight"].abs() * state["gate"].sigmoid()

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        self.constrained.append(updates)
        state["gate"].clamp_(-0.55, 0.55)


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(count)
    ]


def groups(net: nn.Module, form: Reparametrization | None = None) -> list[ParameterGroup]:
    gated = form or Gated({"weight": Sgd(0.9, 1e-3), "gate": Adam()}, {"gate": 0.3})
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    others = {n: p for n, p in net.named_parameters() if p.ndim == 1}
    plain = Plain({"weight": Adam()})
    return [ParameterGroup("gated", weights, gated, 0.1), ParameterGroup("other", others, plain, 0.02)]


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor], double: bool = True) -> Tensor:
    """In float64, so that what is left of the comparison is the optimizer's rounding."""
    images, labels = batch
    if not double:
        return functional.cross_entropy(net(images), labels)
    parameters = {n: p.double() for n, p in net.named_parameters()}
    return functional.cross_entropy(functional_call(net, parameters, (images.double(),)), labels)


def trained(net: nn.Module, optimizer: ShardedOptimizer, given: list[tuple[Tensor, Tensor]]) -> None:
    """The plain loop of any PyTorch user."""
    for batch in given:
        for _ in optimizer.sampling.samples:
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()


class Reference:
    """The same training in float64, by autograd through the whole network and torch's optimizers."""

    def __init__(self, net: nn.Module, seed: int, samples: tuple[int, ...], clip: float) -> None:
        self.net, self.seed, self.samples, self.clip = net, seed, samples, clip
        values = {n: p.detach().double() for n, p in net.named_parameters()}
        self.weights = {n: v.clone().requires_grad_() for n, v in values.items() if v.ndim > 1}
        self.gates = {n: torch.full_like(v, 0.5).requires_grad_() for n, v in self.weights.items()}
        self.others = {n: v.clone().requires_grad_() for n, v in values.items() if v.ndim == 1}
        self.optimizers = [
            torch.optim.SGD(self.weights.values(), 0.1, 0.9, weight_decay=1e-3),
            torch.optim.Adam(self.gates.values(), 0.03),
            torch.optim.Adam(self.others.values(), 0.02),
        ]
        self.divisors: list[float] = []

    def parameters(self, step: int, sample: int) -> dict[str, Tensor]:
        numels = [w.numel() for w in self.weights.values()]
        noise = Gated({}).noise(sum(numels), Draw(self.seed, step, sample)).double().split(numels)
        made = {
            n: w * w.abs() * g.sigmoid() + e.view_as(w) * g
            for (n, w), g, e in zip(self.weights.items(), self.gates.values(), noise, strict=True)
        }
        return {**made, **self.others}

    def step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        images, labels = batch
        loss = torch.stack([
            functional.cross_entropy(functional_call(self.net, self.parameters(number, s), (images.double(),)), labels)
            for s in self.samples
        ]).mean()  # fmt: skip
        every = [p for o in self.optimizers for p in o.param_groups[0]["params"]]
        for p, g in zip(every, torch.autograd.grad(loss, every), strict=True):
            p.grad = g
        norm = float(torch.cat([p.grad.reshape(-1) for p in every]).norm())
        self.divisors.append(max(1.0, norm / self.clip) if self.clip else 1.0)
        for p in every:
            p.grad /= self.divisors[-1]
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for gate in self.gates.values():
                gate.clamp_(-0.55, 0.55)
