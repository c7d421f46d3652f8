"""Do RigL, SET, ST-3 and Feather train N:M masks (and the first two kernels) as written out here in float64, for 20
steps?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.errors import InputError
from ghostmask.engine.position import Phase
from ghostmask.engine.registry import resolve
from ghostmask.engine.sharding.optimizer import ShardedOptimizer
from ghostmask.engine.sharding.reparametrization import Draw
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.launcher.settings import settings_of
from ghostmask.masks.kernels.noise import hashed, uniforms
from ghostmask.masks.masked import Masked
from ghostmask.masks.method import MaskMethod, Recipe
from ghostmask.masks.registry import METHODS

STEPS, LR, MOMENTUM, DECAY, SEED = 20, 0.05, 0.9, 5e-3, 3
EVERY, END, DROP = 4, 15, 0.9
Weights = dict[str, Tensor]


def network() -> nn.Module:
    """Blocks of 3 and of 1 input channels (depthwise), whole ones, and 10 = 4 + 4 + 2."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=8), nn.Tanh(), nn.Conv2d(8, 10, 3, 2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 12),
    )  # fmt: skip


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        yield torch.randn(16, 3, 12, 12, generator=g, dtype=torch.float64), torch.randint(5, (16,), generator=g)


def loss_of(theta: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
    wide = {n: t.double() for n, t in theta.items()}
    return functional.cross_entropy(functional_call(network(), wide, (batch[0],)), batch[1])


def method_of(name: str, net: nn.Module, world: World | None = None, **settings: Any) -> tuple[MaskMethod, Phase]:
    """The method, and a main phase of one step per epoch."""
    recipe = Recipe(OptimConfig(LR, momentum=MOMENTUM, weight_decay=DECAY), FinetuneConfig(epochs=0), STEPS, SEED)
    chosen = settings_of(name)(**settings)
    return resolve(METHODS[name])(chosen, net, recipe, world or single()), Phase("train", 0, STEPS, 1)


def trained(name: str, **settings: Any) -> Iterator[tuple[Weights, Weights, Weights]]:
    """Ours, before the first and after every step: (theta of all parameters, masks, w under them)."""
    net = network()
    method, phase = method_of(name, net, **settings)
    method.begin(phase, None, lambda line: None)  # type: ignore[arg-type]  (none of these looks at images)
    optimizer = ShardedOptimizer(method.enter(phase).groups)
    group, state, part = optimizer.group("prunable")
    form = group.reparametrization
    assert isinstance(form, Masked)

    def seen() -> tuple[Weights, Weights, Weights]:
        theta = {n: p.detach().clone() for n, p in net.named_parameters()}
        return theta, part.gathered(form.mask(state, part)), part.gathered(state["weight"])

    yield seen()
    for batch in batches():
        optimizer.zero_grad()
        loss_of(dict(net.named_parameters()), batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield seen()


# The same, written anew


def blocks_of(shape: torch.Size, of: int) -> list[list[int]]:
    """The places in the flattened weight of every block."""
    places = torch.arange(shape.numel()).view(shape[0], shape[1], -1)
    return [
        places[row, first : first + of, place].tolist()
        for row in range(shape[0]) for place in range(places.shape[2]) for first in range(0, shape[1], of)
    ]  # fmt: skip


def kernels_of(shape: torch.Size) -> list[list[int]]:
    return torch.arange(shape.numel()).view(-1, shape[2:].numel()).tolist()  # type: ignore[no-any-return]


class Reference:
    """Weights, masks and momentum in float64; SGD is torch's."""

    def __init__(self, weights: Weights, masks: Weights) -> None:
        self.masks = {n: m.clone() for n, m in masks.items()}
        self.w = {n: w.double() for n, w in weights.items()}
        self.b = {n: torch.zeros_like(w) for n, w in self.w.items()}

    def gradient(self, theta: Weights, batch: tuple[Tensor, Tensor]) -> Weights:
        leaves = {n: t.detach().requires_grad_() for n, t in theta.items()}
        return dict(zip(leaves, torch.autograd.grad(loss_of(leaves, batch), list(leaves.values())), strict=True))

    def sgd(self, gradient: Weights) -> None:
        for n, g in gradient.items():
            self.b[n] = MOMENTUM * self.b[n] + g + DECAY * self.w[n]
            self.w[n] = self.w[n] - LR * self.b[n]

    def exchange(self, promise: Weights, t: int, of: int) -> None:
        """of: M; 0: kernels."""
        share = 0.5 * DROP * (1 + math.cos(math.pi * t / END))
        for n, old in self.masks.items():
            units = kernels_of(old.shape) if not of else [[i] for i in range(old.numel())]
            flat, w, p = old.reshape(-1), self.w[n].abs().reshape(-1), promise[n].reshape(-1)
            kept = [u for u in units if flat[u[0]]]
            smallest = sorted(kept, key=lambda u, w=w: float(w[u].mean()))[: math.floor(share * len(kept))]
            new = flat.clone()
            for unit in smallest:
                new[unit] = False
            for pool in blocks_of(old.shape, of) if of else [range(old.numel())]:
                lost = [u for u in smallest if u[0] in pool]
                free = [u for u in units if u[0] in pool and not new[u[0]]]
                for unit in sorted(free, key=lambda u, p=p: -float(p[u].mean()))[: len(lost)]:
                    new[unit] = True
            self.masks[n] = new.view(old.shape)
            for tensor in (self.w, self.b):
                tensor[n] = torch.where(self.masks[n] & old, tensor[n], 0.0)

    def sparse(self, of: int, number: int, power: int) -> Weights:
        """(|w|^power - t^power)^(1/power) of each block's `number` largest, t the next one; with power 1 also c_out."""
        theta = {}
        for n in self.masks:
            w, mask = self.w[n].reshape(-1), torch.zeros(self.w[n].numel(), dtype=torch.bool)
            out = torch.zeros_like(w)
            for block in blocks_of(self.w[n].shape, of):
                order = sorted(block, key=lambda i, w=w: -abs(float(w[i])))
                t = w[order[number]].abs() if len(order) > number else torch.zeros(()).double()
                for i in order[:number]:
                    mask[i], out[i] = True, w[i].sign() * (w[i].abs() ** power - t**power) ** (1 / power)
            rows, size = [x.view(len(self.w[n]), -1) for x in (mask, w.abs())], w.numel() / len(self.w[n])
            q = ((rows[0] * rows[1]).sum(1) / size + 1e-6) / (rows[1].sum(1) / size + 1e-6)
            scale = 1.01 / (q + 0.01) if power == 1 else torch.ones_like(q)
            theta[n] = (out.view(len(q), -1) * scale[:, None]).view_as(self.w[n])
            self.masks[n] = mask.view_as(self.w[n])
        return theta


def moving(r: Reference, t: int, batch: tuple[Tensor, Tensor], name: str, of: int) -> None:
    """Update number t of RigL or SET."""
    theta = {n: w * r.masks[n] if n in r.masks else w for n, w in r.w.items()}
    gradient = r.gradient(theta, batch)
    if t % EVERY or t >= END:
        return r.sgd({n: g * r.masks[n] if n in r.masks else g for n, g in gradient.items()})
    sizes = [m.numel() for m in r.masks.values()]
    drawn = uniforms(hashed(f"growth {SEED} {t}", 8), 0, sum(sizes), "cpu").split(sizes)
    chance = {n: d.double() for n, d in zip(r.masks, drawn, strict=True)}
    return r.exchange({n: g.abs() for n, g in gradient.items()} if name == "rigl" else chance, t, of)


def density(updates: int, first: int, last: int) -> float:
    return 0.5 + 0.5 * (1 - min(max((updates - first) / (last - first), 0.0), 1.0)) ** 3


MOVES = {"update_every": EVERY, "end_fraction": 0.75, "drop_fraction": DROP}


@pytest.mark.parametrize("name", ["rigl", "set"])
@pytest.mark.parametrize("granularity", ["2:4", "kernel"])
def test_twenty_steps_of_weights_that_move_are_those_of_float64(name: str, granularity: str) -> None:
    ours = trained(name, granularity=granularity, **MOVES, **({} if granularity == "2:4" else {"density": 0.4}))
    theta, masks, _ = next(ours)
    reference = Reference(theta, masks)
    before, changed = masks, []
    for t, (batch, (theta, masks, _)) in enumerate(zip(batches(), ours, strict=True), 1):
        moving(reference, t, batch, name, 4 if granularity == "2:4" else 0)
        for n, value in theta.items():
            wanted = reference.w[n] * reference.masks.get(n, torch.ones(()))
            torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)
        assert all(torch.equal(masks[n], mask) for n, mask in reference.masks.items()), t
        check_units(masks, granularity)
        changed += [t] if any(not torch.equal(masks[n], before[n]) for n in masks) else []
        before = masks
    assert changed == [4, 8, 12]


def check_units(masks: Weights, granularity: str) -> None:
    for mask in masks.values():
        flat = mask.reshape(-1)
        if granularity == "kernel":
            assert all(len({bool(flat[i]) for i in kernel}) == 1 for kernel in kernels_of(mask.shape))
        else:
            assert all(int(flat[block].sum()) == min(2, len(block)) for block in blocks_of(mask.shape, 4))
    if granularity == "kernel":
        total = sum(m.numel() for m in masks.values())
        assert round(0.4 * total) - 9 < sum(int(m.sum()) for m in masks.values()) <= round(0.4 * total)


THRESHOLDS: dict[str, tuple[str, dict[str, Any], tuple[int, int], int, float]] = {
    # case: (method, settings, window of the density, power, what the gradient of pruned weights is multiplied by)
    "st3": ("st3", {}, (1, 10), 1, 1.0),
    "feather": ("feather", {"theta": 0.5}, (0, 10), 3, 0.5),
}


@pytest.mark.parametrize("case", THRESHOLDS)
def test_twenty_steps_of_a_threshold_per_block_are_those_of_float64(case: str) -> None:
    name, settings, window, power, slope = THRESHOLDS[case]
    ours = trained(name, granularity="2:4", **settings)
    theta, masks, weights = next(ours)
    reference = Reference({**theta, **weights}, masks)
    numbers = []
    for t, batch in enumerate([*batches(), None]):
        numbers.append(math.ceil(round(4 * density(t, *window), 9)))
        shown = reference.sparse(4, numbers[-1], power)
        for n, mask in reference.masks.items():
            assert torch.equal(masks[n], mask), (t, n)
            # Feather's theta has an infinite slope at the threshold: there its cube is what rounding leaves alone.
            torch.testing.assert_close(theta[n].double() ** power, shown[n] ** power, rtol=0, atol=1e-6)
            torch.testing.assert_close(weights[n].double(), reference.w[n], rtol=0, atol=1e-6)
        if batch is not None:
            gradient = reference.gradient({**reference.w, **shown}, batch)
            for n, mask in reference.masks.items():
                gradient[n] = torch.where(mask, gradient[n], slope * gradient[n])
            reference.sgd(gradient)
            theta, masks, weights = next(ours)
    assert sorted(set(numbers), reverse=True) == [4, 3, 2], "the schedule hardly fell: nothing was shown"
    check_units(masks, "2:4")


# The same on any number of ranks


FORMS: dict[str, dict[str, Any]] = {
    "rigl 3:5": {"update_every": 2},
    "set kernel": {"update_every": 2, "density": 0.4, "min_per_layer": 7},
    "st3 2:4": {"end_fraction": 0.2},
    "feather 1:3": {"end_fraction": 0.2},
}


def states(world: World) -> dict[str, list[Tensor]]:
    """Every form's first masks, and its whole state and theta after 4 made-up updates."""
    found = {}
    for case, settings in FORMS.items():
        name, granularity = case.split()
        method, phase = method_of(name, network(), world, granularity=granularity, **settings)
        method.begin(phase, None, lambda line: None)  # type: ignore[arg-type]
        form: Any = method.reparametrization(phase)
        shapes = {n: w.shape for n, w in method.weights.items()}
        part = Slice(Layout(shapes, world.size, 300 if world.size > 1 else 0, 2), world)
        first = [m.clone() for m in method.found.values()]
        state = form.start(part.cut({n: w.detach() for n, w in method.weights.items()}), part)
        state |= {"weight.momentum": torch.zeros(part.numel)}
        for t in range(1, 5):
            g = torch.Generator().manual_seed(t)
            gradient = part.cut({n: torch.randn(shape, generator=g).mul_(4).round_() for n, shape in shapes.items()})
            form.schedule(t - 1)
            slopes = form.gradients(gradient, state, part, Draw(0, t, 0))
            if form.replaces(t):
                form.replacement(state, slopes, part, t)
            else:
                state["weight"] -= 0.05 * slopes["weight"]
                form.constrain(state, part, t)
        flat = [v for k, v in state.items() if k in form.whole]
        sharded = [v for k, v in state.items() if k not in form.whole] + [form.evaluation_weights(state, part)]
        found[case] = [*first, *flat, *(w for v in sharded for w in part.gathered(v).values())]
    return found


def test_masks_and_thresholds_are_the_same_bits_on_1_2_and_4_ranks() -> None:
    alone = states(single())
    for ranks in (2, 4):
        for rank in run_distributed(states, ranks):
            for case, tensors in rank.items():
                assert len(tensors) == len(alone[case])
                assert all(torch.equal(a, b) for a, b in zip(tensors, alone[case], strict=True)), (case, ranks)


# What is in the state, and what is refused


@pytest.mark.parametrize(("name", "more"), [("st3", {"rescale"}), ("feather", set())])
def test_only_blocks_have_a_threshold_per_weight(name: str, more: set[str]) -> None:
    for granularity, key, size in (("weight", "threshold", 1), ("2:4", "thresholds", 1128)):
        method, phase = method_of(name, network(), granularity=granularity)
        part = Slice.even(method.weights, single())
        state = method.reparametrization(phase).start(torch.ones(part.numel), part)
        assert state.keys() == {"weight", "mask", key} | more
        assert len(state[key]) == size


REFUSED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (("rigl", "set"), {"granularity": "2:4", "allocation": "er"}, r"mask\.allocation = 'er'.*in every block"),
    (("rigl", "set"), {"granularity": "2:4", "min_per_layer": 1}, r"mask\.min_per_layer = 1.*in every block"),
    (("rigl", "st3", "feather"), {"granularity": "2:4", "density": 0.05}, r"mask\.density = 0\.05.*keeps 0\.5"),
    (("rigl", "set"), {"granularity": "channel"}, r"mask\.granularity = 'channel': no gradient.*use kernel"),
    (("st3", "feather"), {"granularity": "channel"}, r"mask\.granularity = 'channel': .*use weight, N:M"),
    (("st3", "feather"), {"granularity": "kernel"}, r"mask\.granularity = 'kernel': .*use weight, N:M"),
    (("st3", "feather"), {"granularity": "4:2"}, r"mask\.granularity = '4:2' is not known: known: 1:4, 2:4, weight$"),
    (("st3",), {"granularity": "2:4", "sigma": True}, r"mask\.sigma = True: is not read with.*leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "values", "said"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(names: tuple[str, ...], values: dict[str, Any], said: str) -> None:
    make: Callable[..., Any]
    for name in names:
        make = settings_of(name)
        with pytest.raises(InputError, match=said) as refused:
            make(method=name, **values)
        assert "\n" not in str(refused.value)
