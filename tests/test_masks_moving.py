"""Are RigL, SET and AC/DC what their papers say: twenty steps written out in float64, and published layer densities?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from gated import batches, loss_of
from memory_run import CONFIG, configured
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torchvision.models import resnet50

from ghostmask.engine.errors import InputError
from ghostmask.engine.sharding.optimizer import ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Plain
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.kernels.noise import hashed, uniforms
from ghostmask.masks.masked import PRUNABLE, ChangingMask
from ghostmask.masks.methods.acdc import AcDc, Alternating, changes, fits
from ghostmask.masks.methods.acdc import Settings as AcDcSettings
from ghostmask.masks.methods.rigl import ByGradient, RigL
from ghostmask.masks.methods.set import ByChance
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.regrowing import Exchanges
from ghostmask.masks.scoring.allocation import layer_counts
from ghostmask.masks.scoring.topk import Budget
from ghostmask.models.flops import count_flops

STEPS, LR, MOMENTUM, DECAY = 20, 0.2, 0.9, 1e-3
EVERY, END, DROP, SEED = 4, 15, 0.6, 5
CHANGES = [(4, True), (8, False), (11, True), (13, False), (16, True)]


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))


def drawn_masks(net: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {n: torch.rand(p.shape, generator=generator) < 0.6 for n, p in net.named_parameters() if p.ndim > 1}


class Reference:
    """Weights w (0 where pruned), masks and momentum in float64, where there are no ties.

    SGD is torch's: b = 0.9 b + g + d w, w = w - lr b.
    """

    def __init__(self, net: nn.Module, masks: dict[str, Tensor]) -> None:
        self.net, self.masks = net, masks
        self.w = {n: p.detach().double() * masks.get(n, 1.0) for n, p in net.named_parameters()}
        self.b = {n: torch.zeros_like(w) for n, w in self.w.items()}

    def gradient(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """dL/d(theta) of every position."""
        theta = {n: (w * self.masks.get(n, 1.0)).requires_grad_() for n, w in self.w.items()}
        logits = functional_call(self.net, theta, (batch[0].double(),))
        loss = functional.cross_entropy(logits, batch[1])
        return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))

    def sgd(self, gradient: dict[str, Tensor]) -> None:
        for n, g in gradient.items():
            self.b[n] = MOMENTUM * self.b[n] + g * self.masks.get(n, 1.0) + DECAY * self.w[n]
            self.w[n] = self.w[n] - LR * self.b[n]

    def exchange(self, scores: dict[str, Tensor], t: int) -> None:
        """Evci et al. 2020, algorithm 1, layer by layer, with whole sorts."""
        for n, old in self.masks.items():
            count = int(0.5 * DROP * (1 + math.cos(math.pi * t / END)) * int(old.sum()))
            by_size = sorted(
                old.reshape(-1).nonzero().squeeze(1).tolist(), key=lambda i, n=n: abs(self.w[n].view(-1)[i])
            )
            stay = set(by_size[count:])
            free = [i for i in range(old.numel()) if i not in stay]
            grown = sorted(free, key=lambda i, n=n: -scores[n].reshape(-1)[i])[:count]
            new = torch.zeros(old.numel(), dtype=torch.bool)
            new[[*stay, *grown]] = True
            new = new.view(old.shape)
            self.masks[n] = new
            for tensor in (self.w, self.b):
                tensor[n] = torch.where(new & old, tensor[n], 0.0)

    def compress(self, kept: int) -> None:
        """Theta <- T_k(theta): the k largest of all layers together."""
        sizes = torch.cat([self.w[n].abs().reshape(-1) for n in self.masks])
        threshold = sizes.sort(descending=True).values[kept - 1]
        for n in self.masks:
            self.masks[n] = self.w[n].abs() >= threshold
            self.w[n] = self.w[n] * self.masks[n]


def by_gradient(reference: Reference, batch: tuple[Tensor, Tensor], t: int) -> None:
    gradient = reference.gradient(batch)
    if t % EVERY == 0 and t < END:
        reference.exchange({n: g.abs() for n, g in gradient.items()}, t)
    else:
        reference.sgd(gradient)


def by_chance(reference: Reference, batch: tuple[Tensor, Tensor], t: int) -> None:
    if t % EVERY == 0 and t < END:
        shapes = {n: m.shape for n, m in reference.masks.items()}
        sizes = [shape.numel() for shape in shapes.values()]
        numbers = uniforms(hashed(f"growth {SEED} {t}", 8), 0, sum(sizes), "cpu").split(sizes)
        reference.exchange(dict(zip(shapes, numbers, strict=True)), t)
    else:
        reference.sgd(reference.gradient(batch))


def alternating(reference: Reference, batch: tuple[Tensor, Tensor], t: int) -> None:
    reference.sgd(reference.gradient(batch))
    change = dict(CHANGES).get(t)
    if change is None:
        return
    reference.b = {n: torch.zeros_like(b) for n, b in reference.b.items()}
    if change:
        reference.compress(round(0.3 * sum(m.numel() for m in reference.masks.values())))
    else:
        reference.masks = {n: torch.ones_like(m) for n, m in reference.masks.items()}


def form_of(name: str, masks: dict[str, Tensor]) -> ChangingMask:
    rule = Sgd(MOMENTUM, DECAY)
    if name == "acdc":
        return Alternating(rule, Budget(0.3), CHANGES)
    kept, exchanges = [int(m.sum()) for m in masks.values()], Exchanges(EVERY, END, DROP)
    return {"rigl": ByGradient, "set": ByChance}[name](rule, masks, kept, exchanges, SEED)


def trajectory(name: str) -> Iterator[tuple[int, nn.Module, ShardedOptimizer, Reference]]:
    """After every step: its number from 1, the network, our optimizer, the reference."""
    net, masks = network(), drawn_masks(network())
    if name == "acdc":
        masks = {n: torch.ones_like(m) for n, m in masks.items()}
    weights = {n: p for n, p in net.named_parameters() if n in masks}
    others = {n: p for n, p in net.named_parameters() if n not in masks}
    plain = Plain({"weight": Sgd(MOMENTUM, DECAY)})
    groups = [ParameterGroup(PRUNABLE, weights, form_of(name, masks), LR), ParameterGroup("other", others, plain, LR)]
    optimizer, reference = ShardedOptimizer(groups), Reference(network(), dict(masks))
    follow: Callable[[Reference, tuple[Tensor, Tensor], int], None]
    follow = {"rigl": by_gradient, "set": by_chance, "acdc": alternating}[name]
    for t, batch in enumerate(batches(STEPS), 1):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        follow(reference, batch, t)
        yield t, net, optimizer, reference


@pytest.mark.parametrize("name", ["rigl", "set", "acdc"])
def test_twenty_steps_are_the_papers_algorithm_in_float64(name: str) -> None:
    seen = []
    for t, net, optimizer, reference in trajectory(name):
        _, state, part = optimizer.group(PRUNABLE)
        masks = part.gathered(state["mask"])
        for n, p in net.named_parameters():
            mask = reference.masks.get(n, torch.ones(()))
            assert torch.equal(masks.get(n, mask).bool(), mask.bool()), (t, n)
            torch.testing.assert_close(p.detach().double(), reference.w[n] * mask, rtol=0, atol=1e-6)
        momentum = part.gathered(state["weight.momentum"])
        for n, b in momentum.items():
            torch.testing.assert_close(b.double(), reference.b[n], rtol=0, atol=1e-6)
        seen.append(torch.cat([m.reshape(-1) for m in masks.values()]))
    changed = [t for t, (a, b) in enumerate(pairwise(seen), 2) if not torch.equal(a, b)]
    assert changed == ([4, 8, 12] if name != "acdc" else [4, 8, 11, 13, 16])


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_an_exchange_takes_the_place_of_a_step_of_all_groups(name: str) -> None:
    before: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for t, net, optimizer, _ in trajectory(name):
        now = {n: p.detach().clone() for n, p in net.named_parameters()}
        moved = [n for n, p in now.items() if before and not torch.equal(p, before[n])]
        if t % EVERY == 0 and t < END:
            assert moved
            assert set(moved) <= {"0.weight", "2.weight", "4.weight"}
            for n in moved:
                lost = (now[n] == 0) & (before[n] != 0)
                assert torch.equal(torch.where(lost, 0.0, before[n]), now[n]), "nothing but zeros is new"
            assert optimizer.norms == norms, "norms are those of the last step that moved anything"
        elif t > 1:
            assert len(moved) == 6
        before, norms = now, dict(optimizer.norms)


def test_gradients_that_are_not_finite_exchange_nothing() -> None:
    for t, net, optimizer, _ in trajectory("rigl"):
        if t == EVERY - 1:
            mask = optimizer.group(PRUNABLE)[1]["mask"].clone()
            for p in net.parameters():
                p.grad = torch.full_like(p, float("inf"))
            optimizer.step()
            assert not optimizer.finite
            assert torch.equal(optimizer.group(PRUNABLE)[1]["mask"], mask)
            assert optimizer.updates == t
            return


def test_fractions_fall_along_a_cosine_and_are_rounded_down_layer_by_layer() -> None:
    exchanges = Exchanges(100, 750, 0.3)
    assert [t for t in range(2000) if exchanges.at(t)] == [100, 200, 300, 400, 500, 600, 700]
    assert exchanges.dropped([1000, 10, 3], 375) == [150, 1, 0]  # half way
    assert exchanges.dropped([1000], 100) == [math.floor(150 * (1 + math.cos(math.pi * 100 / 750)))]


PUBLISHED = [  # github.com/google-research/rigl, README, "Best Sparse Models": density, FLOPs of 8.2e9, megabytes
    ("erk", 0.2, 0.42, 23.683), ("erk", 0.1, 0.24, 13.499), ("erk", 0.05, 0.12, 8.399),
    ("uniform", 0.2, 0.23, 23.685), ("uniform", 0.1, 0.13, 13.532), ("uniform", 0.05, 0.08, 8.433),
]  # fmt: skip


@pytest.mark.parametrize(("allocation", "density", "flops", "megabytes"), PUBLISHED)
def test_resnet50_has_the_published_cost_and_size(
    allocation: str, density: float, flops: float, megabytes: float
) -> None:
    """A size is 4 bytes a kept weight, a bit a weight in layers that are not dense, 4 bytes a channel."""
    with torch.device("meta"):
        weights = prunable_weights(net := resnet50())
    shapes, sizes = [tuple(w.shape) for w in weights.values()], [w.numel() for w in weights.values()]
    kept = layer_counts(shapes, density, allocation, first_dense=allocation == "uniform")
    assert sum(kept) == round(density * sum(sizes))
    dense, sparse = count_flops(net, (3, 224, 224), dict(zip(weights, kept, strict=True)))
    assert dense == pytest.approx(8.2e9, rel=0.005)
    assert sparse / dense == pytest.approx(flops, abs=0.0075)
    found = sum(4 * k + (n / 8 if k < n else 0) + 4 * s[0] for k, n, s in zip(kept, sizes, shapes, strict=True)) / 1e6
    # There the first layer is dense beyond the budget, here within it: 9,408 weights.
    extra = 4 * (1 - density) * sizes[0] / 1e6 if allocation == "uniform" else 0.0
    assert found + extra == pytest.approx(megabytes, abs=0.0006 if (allocation, density) != ("uniform", 0.2) else 0.05)
    assert (kept[0] == sizes[0]) == (allocation == "uniform")


def test_a_dense_first_layer_beyond_the_budget_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"mask\.density = 0\.1: a dense first layer of 90 weights is more than the 10"
    ):
        layer_counts([(9, 10), (2, 5)], 0.1, "uniform", first_dense=True)


def test_acdc_has_the_papers_epochs_by_default_and_its_cifar_ones_by_fractions() -> None:
    imagenet = [(e, i % 2 == 0) for i, e in enumerate(range(10, 80, 5))] + [(85, True)]
    assert changes(AcDcSettings(), 100) == imagenet
    cifar = AcDcSettings(first_fraction=0.05, phase_fraction=0.1)
    assert changes(cifar, 200) == [
        (10, True), (30, False), (50, True), (70, False), (90, True), (110, False), (130, True), (150, False),
        (170, True),
    ]  # fmt: skip
    assert fits(AcDcSettings(), 100)
    assert not fits(AcDcSettings(), 9)
    with pytest.raises(InputError, match=r"mask\.first_fraction = 0\.8: give less than mask\.last_dense_fraction"):
        AcDcSettings(first_fraction=0.8)


def test_a_schedule_that_rounds_to_nothing_is_refused_with_the_shortest_length() -> None:
    run = configured(CONFIG, mask={"method": "rigl", "update_every": 100, "end_fraction": 0.75})
    with pytest.raises(
        InputError, match=re.escape("mask.update_every = 100: no weight moves before update 9, where")
    ) as e:
        RigL.check_steps(run.mask, run, 4)  # 3 epochs of 4 steps
    assert str(e.value).endswith("give at most 8, or train.epochs=34")
    for epochs, refused in ((33, True), (34, False)):
        longer = configured(run, train={"epochs": epochs})
        with pytest.raises(InputError) if refused else nullcontext():
            RigL.check_steps(longer.mask, longer, 4)
    run = configured(CONFIG, mask={"method": "acdc", "first_fraction": 0.1, "phase_fraction": 0.05})
    with pytest.raises(
        InputError, match=r"train\.epochs = 3: some of AC/DC's phases \(mask\.phase_fraction = 0\.05\)"
    ) as e:
        AcDc.check_steps(run.mask, run, 4)
    enough = int(str(e.value).partition("give at least ")[2].partition(",")[0])
    assert not fits(run.mask, 4 * (enough - 1))
    AcDc.check_steps(run.mask, configured(run, train={"epochs": enough}), 4)


def tied_exchange(world: World, seed: int) -> tuple[Tensor, Tensor]:
    """(the mask before, after) an exchange where all weights and all gradients are equal."""
    shapes = {"a": torch.Size([40, 5]), "b": torch.Size([300])}
    part = Slice(Layout(shapes, world.size, 150 if world.size > 1 else 0), world)
    masks = {n: torch.arange(shape.numel()).view(shape) % 2 == 0 for n, shape in shapes.items()}
    form = ByGradient(Sgd(MOMENTUM), masks, [100, 150], Exchanges(1, 100, 1.0), seed)
    ones = torch.ones(part.numel)
    state = form.start(ones.clone(), part) | {"weight.momentum": torch.zeros(part.numel)}
    before = state["mask"].clone()
    form.replacement(state, {"weight": ones}, part, 50)
    whole = [part.gathered(mask) for mask in (before, state["mask"])]
    return tuple(torch.cat([m.reshape(-1) for m in w.values()]) for w in whole)  # type: ignore[return-value]


def test_ties_are_broken_by_a_seeded_hash_of_the_index_in_every_layer_alike_on_any_ranks() -> None:
    before, after = tied_exchange(single(), 1)
    for rank in run_distributed(tied_exchange, 3, 1):
        assert torch.equal(rank[1], after)
    assert [int(after[:200].sum()), int(after[200:].sum())] == [100, 150]
    lost = (before & ~after).nonzero().squeeze(1)
    assert 40 < len(lost) <= 50 + 75
    assert 50 < float(lost[lost < 200].double().mean()) < 150, "not the first or the last ones"
    assert not torch.equal(after, tied_exchange(single(), 2)[1])
