"""Is a step of the search algorithm 1, written out in float64 with autograd over the whole network?"""

from __future__ import annotations

import pytest
import torch
from mask_reference import bounded, projected, relaxed_mask
from memory_data import MemoryData
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ghostmask.engine.sharding.optimizer import Sampling, ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Draw, Plain
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.world import single
from ghostmask.masks.masked import PRUNABLE
from ghostmask.masks.relaxed import RelaxedMask, Search


class Small(nn.Module):
    """Two convolutions, batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
        self.fc = nn.Linear(5 * 16, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv2(self.bn(self.conv1(images)).relu()).relu().flatten(1))
        return logits


class Reference:
    """Algorithm 1 in float64, by autograd through the whole network; SGD, Adam, clip and projection written out."""

    def __init__(self, net: nn.Module, search: Search, samples: tuple[int, ...], clip: float) -> None:
        self.net, self.search, self.samples, self.clip = net, search, samples, clip
        self.prunable = [n for n, p in net.named_parameters() if p.ndim > 1]
        self.w = {n: p.detach().double().requires_grad_() for n, p in net.named_parameters()}
        # Spread out, some at the limits: where all are 1, Adam would turn gradients of 1e-9 into steps of full size.
        drawn = torch.rand(sum(self.w[n].numel() for n in self.prunable), generator=torch.Generator().manual_seed(2))
        self.s = torch.where(drawn < 0.05, 0.0, torch.where(drawn > 0.8, 1.0, drawn)).double()
        self.momentum = {n: torch.zeros_like(p) for n, p in self.w.items()}
        self.first, self.second = torch.zeros_like(self.s), torch.zeros_like(self.s)
        self.divisor, self.binding = 1.0, False
        self.cancelled = torch.zeros_like(self.s, dtype=torch.bool)
        """Where the last gradient nearly cancelled out: Adam makes a step of what is left, rounding included."""

    def loss(self, s: Tensor, images: Tensor, labels: Tensor, draw: Draw, temperature: float) -> Tensor:
        masks = relaxed_mask(s, 0, draw, temperature).split([self.w[n].numel() for n in self.prunable])
        made = {n: self.w[n] * m.view_as(self.w[n]) for n, m in zip(self.prunable, masks, strict=True)}
        buffers = {n: b.double() for n, b in self.net.named_buffers() if b.is_floating_point()}
        logits = functional_call(self.net, {**self.w, **made, **buffers}, (images.double(),))
        return functional.cross_entropy(logits, labels)

    def step(self, images: Tensor, labels: Tensor, number: int, lr: float, rate: float, rule: Sgd) -> None:
        """Update number `number`, from 0, of learning rates lr (weights) and rate (probabilities)."""
        epoch = number // self.search.steps_per_epoch
        tau = (1 - self.search.temperature_end) * (1 - (epoch + 1) / self.search.epochs) + self.search.temperature_end
        s = self.s.clone().requires_grad_()
        draws = [Draw(3, 50 + number, sample) for sample in self.samples]
        loss = torch.stack([self.loss(s, images, labels, d, tau) for d in draws]).mean()
        *slopes, by_s = torch.autograd.grad(loss, [*self.w.values(), s])
        by_s = bounded(by_s, self.s)
        norm = float(torch.cat([g.reshape(-1) for g in (*slopes, by_s)]).norm())
        self.divisor = max(1.0, norm / self.clip)
        with torch.no_grad():
            for (name, w), slope in zip(self.w.items(), slopes, strict=True):
                self.momentum[name].mul_(rule.momentum).add_(slope / self.divisor + rule.weight_decay * w)
                w.sub_(lr * self.momentum[name])
        g = by_s / self.divisor
        self.cancelled = (g.abs() < 1e-3 * g.abs().mean()) & (g != 0)
        self.first = 0.9 * self.first + 0.1 * g
        self.second = 0.999 * self.second + 0.001 * g * g
        first, second = self.first / (1 - 0.9 ** (number + 1)), self.second / (1 - 0.999 ** (number + 1))
        z = self.s - rate * first / (second.sqrt() + 1e-8)
        search = self.search
        left = 1 - (epoch - search.start) / (search.end - search.start)
        density = 1.0 if epoch < search.start else search.density + (1 - search.density) * max(0.0, left) ** 3
        self.s = projected(z, density * len(z))
        self.binding = float(z.clamp(0, 1).sum()) > density * len(z)

    def take(self, optimizer: ShardedOptimizer) -> None:
        """Go on from the optimizer's state: what is compared is one step, and no rounding grows from step to step."""
        for _, state, part in (optimizer.group(g.name) for g in optimizer.groups):
            for name, value in part.gathered(state["weight"]).items():
                self.w[name] = value.double().requires_grad_()
            for name, value in part.gathered(state["weight.momentum"]).items():
                self.momentum[name] = value.double()
        state = optimizer.group(PRUNABLE)[1]
        self.s = state["probability"].double()
        self.first, self.second = (state[f"probability.{n}"].double() for n in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("samples", [(0,), (1, 4)])
def test_a_step_of_algorithm_1_equals_a_float64_computation_by_autograd_over_the_whole_network(
    samples: tuple[int, ...],
) -> None:
    """The network itself runs in float64 on the optimizer's weights: what is compared is the optimizer."""
    torch.manual_seed(1)
    net, data, rule = Small(), MemoryData(single()), Sgd(0.9, 5e-2)
    search = Search(0.3, "global", 0.05, start=1, end=3, epochs=4, steps_per_epoch=2, seed=3)
    reference = Reference(net, search, samples, clip=0.5)
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    others = {n: p for n, p in net.named_parameters() if p.ndim == 1}
    optimizer = ShardedOptimizer(
        [
            ParameterGroup(PRUNABLE, weights, RelaxedMask(search, rule, 0.5), 0.1),
            ParameterGroup("other", others, Plain({"weight": rule}), 0.1),
        ],
        clip=0.5, sampling=Sampling(3, 50, samples),
    )  # fmt: skip
    optimizer.states[0]["probability"].copy_(reference.s)
    optimizer.refresh()
    clipped = bound = 0
    for number, batch in zip(range(8), [*data.train(0), *data.train(1)], strict=False):
        reference.take(optimizer)
        for _ in samples:
            wide = {n: t.double() for n, t in [*net.named_parameters(), *net.named_buffers()] if t.is_floating_point()}
            loss = functional.cross_entropy(functional_call(net, wide, (batch.images.double(),)), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        reference.step(batch.images, batch.labels, number, 0.1, 0.05, rule)
        clipped, bound = clipped + (reference.divisor > 1), bound + reference.binding
        check(optimizer, reference)
    assert clipped >= 2, "the clipping was not tried"
    assert bound >= 3, "the projection was not tried"
    assert bool((reference.s == 0).any()), "no probability reached a limit"


def check(optimizer: ShardedOptimizer, reference: Reference) -> None:
    """Every number of the state within 1e-6 of the reference's."""
    found = {}
    for _, state, part in (optimizer.group(g.name) for g in optimizer.groups):
        found |= part.gathered(state["weight"])
    for name, value in found.items():
        torch.testing.assert_close(value.double(), reference.w[name].detach(), atol=1e-6, rtol=0)
    state = optimizer.group(PRUNABLE)[1]
    difference = (state["probability"].double() - reference.s).abs()
    assert float(difference[~reference.cancelled].max()) <= 1e-6
    assert float(difference.max()) <= 1e-4
    assert float(reference.cancelled.double().mean()) < 0.5
    torch.testing.assert_close(state["probability.exp_avg"].double(), reference.first, atol=1e-7, rtol=1e-4)
    assert float(optimizer.divisor) == pytest.approx(reference.divisor, rel=1e-5)
