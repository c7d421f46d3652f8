"""Do the methods that cut by rank follow their papers' equations, written anew here in float64, for 20 steps?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
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
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import single
from ghostmask.launcher.settings import settings_of
from ghostmask.masks.masked import Masked
from ghostmask.masks.method import MaskMethod, Recipe
from ghostmask.masks.methods.feather import cube_root
from ghostmask.masks.registry import METHODS

STEPS, LR, MOMENTUM, DECAY = 20, 0.05, 0.9, 5e-3
KEPT = {"layerwise": [round(0.2 * n) for n in (216, 864, 120)], "global": [240]}
"""Weights kept at density 0.2 of the network's layers and of all of them."""


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 10),
    )  # fmt: skip


def batches(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        yield torch.randn(16, 3, 10, 10, generator=g).to(dtype), torch.randint(10, (16,), generator=g)


def method_of(name: str, net: nn.Module, epochs: int = STEPS, **settings: Any) -> tuple[MaskMethod, Phase]:
    """The method, and a main phase of one step per epoch."""
    recipe = Recipe(OptimConfig(LR, momentum=MOMENTUM, weight_decay=DECAY), FinetuneConfig(epochs=0), epochs, seed=3)
    method: MaskMethod = resolve(METHODS[name])(settings_of(name)(**settings), net, recipe, single())
    return method, Phase("train", 0, epochs, 1)


def trained(name: str, **settings: Any) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Ours in float32, before every step and at the end: (whole trained state, mask, theta), flat, in network order."""
    net = network()
    method, phase = method_of(name, net, **settings)
    method.prepare()
    setup = method.enter(phase)
    optimizer = ShardedOptimizer(setup.groups)
    group, state, part = optimizer.group("prunable")
    form = group.reparametrization
    assert isinstance(form, Masked)

    def seen() -> tuple[dict[str, Tensor], Tensor, Tensor]:
        theta = torch.cat([w.detach().reshape(-1) for w in method.weights.values()])
        return {n: state[n].clone() for n in ("weight", *form.rules)}, form.mask(state, part).clone(), theta.clone()

    for images, labels in batches(torch.float32):
        yield seen()
        optimizer.zero_grad()
        functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    yield seen()


class Reference:
    """A network in float64 whose weights are made by `theta` from what is trained, by SGD with momentum."""

    def __init__(self, start: dict[str, Tensor], frozen_biases: bool = False) -> None:
        self.net = network().double()
        if frozen_biases:
            for p in self.net.parameters():
                p.requires_grad_(False)
                p.zero_()
        names = [n for n, _ in self.net.named_parameters()]
        self.weights = [n for n in names if n.endswith("weight")]
        self.shapes = [self.net.get_parameter(n).shape for n in self.weights]
        self.sizes = [s.numel() for s in self.shapes]
        self.state = {n: t.double() for n, t in start.items()}
        self.rest = {n: self.net.get_parameter(n).detach().clone() for n in names if n not in self.weights}
        self.momenta: dict[str, Tensor] = {}
        self.learn_rest = not frozen_biases

    def step(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """dL/dtheta, flat; moves the biases."""
        theta = theta.detach().requires_grad_()
        parts = [t.view(s) for t, s in zip(theta.split(self.sizes), self.shapes, strict=True)]
        rest = {n: t.detach().requires_grad_() for n, t in self.rest.items()}
        logits = functional_call(self.net, {**dict(zip(self.weights, parts, strict=True)), **rest}, (images,))
        found = torch.autograd.grad(functional.cross_entropy(logits, labels), [theta, *rest.values()])
        for (name, value), g in zip(rest.items(), found[1:], strict=True):
            if self.learn_rest:
                self.rest[name] = self.moved(name, value.detach(), g)
        return found[0]

    def moved(self, name: str, value: Tensor, gradient: Tensor) -> Tensor:
        """b <- momentum b + g + decay w, w <- w - lr b."""
        self.momenta[name] = MOMENTUM * self.momenta.get(name, torch.zeros_like(value)) + gradient + DECAY * value
        return value - LR * self.momenta[name]


def cut(scores: Tensor, kept: int) -> Tensor:
    """The `kept` largest, by sorting."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True)[:kept]] = True
    return mask


def layerwise(scores: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([cut(s, k) for s, k in zip(scores.split(sizes), KEPT["layerwise"], strict=True)])


def density(step: int, first: int, last: int) -> float:
    """1 - s_f (1 - (1 - x)^3), s_f = 0.8."""
    x = min(max((step - first) / (last - first), 0.0), 1.0)
    return 1 - 0.8 * (1 - (1 - x) ** 3)


def gmp(r: Reference, step: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    if step in (2, 5, 8, 11, 12):  # from 2 on, every 3 steps, and the last one
        mask = cut(r.state["weight"].abs(), round(density(step, 2, 12) * 1200))
    return mask, r.state["weight"] * mask


def gmp_layerwise(r: Reference, step: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    if step in (2, 5, 8, 11, 12):
        layers = r.state["weight"].abs().split(r.sizes)
        mask = torch.cat([cut(w, round(density(step, 2, 12) * len(w))) for w in layers])
    return mask, r.state["weight"] * mask


def dnw(r: Reference, step: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    mask = layerwise(r.state["weight"].abs(), r.sizes)
    return mask, r.state["weight"] * mask


def st3(r: Reference, step: int, mask: Tensor, sigma: bool = False) -> tuple[Tensor, Tensor]:
    w, kept = r.state["weight"], round(density(step, 1, 10) * 1200)
    pairs = list(zip(r.sizes, r.shapes, strict=True))
    scales = torch.cat([torch.full((n,), sum(s) ** -0.5 if sigma else 1.0).double() for n, s in pairs])
    ordered = (w.abs() / scales).sort().values
    t = ordered[1200 - kept - 1] if kept < 1200 else torch.zeros(()).double()
    mask = w.abs() / scales > t
    theta = w.sign() * (w.abs() - t * scales) * mask
    out = []
    layers = [t.split(r.sizes) for t in (theta, mask, w)]
    for layer, kept_of, part, shape in zip(*layers, r.shapes, strict=True):
        rows, magnitude = layer.view(shape[0], -1), part.abs().view(shape[0], -1)
        q = ((magnitude * kept_of.view(shape[0], -1)).mean(1) + 1e-6) / (magnitude.mean(1) + 1e-6)
        out.append(((1.01 / (q + 0.01))[:, None] * rows).flatten())
    return mask, torch.cat(out)


def st3_sigma(r: Reference, step: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    return st3(r, step, mask, sigma=True)


def feather(r: Reference, step: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    w, kept = r.state["weight"], round(density(step, 0, 10) * 1200)
    t = w.abs().sort().values[1200 - kept - 1] if kept < 1200 else torch.zeros(()).double()
    mask = w.abs() > t
    return mask, w.sign() * torch.where(mask, w.abs() ** 3 - t**3, 0.0) ** (1 / 3)


def edge_popup(r: Reference, step: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    mask = layerwise(r.state["score"].abs(), r.sizes)
    return mask, r.state["weight"] * mask


def of_kept(g: Tensor, mask: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": g * mask}


def of_all(g: Tensor, mask: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": g}


def of_scores(g: Tensor, mask: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"score": g * state["weight"] * state["score"].sign()}


def halved(g: Tensor, mask: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": torch.where(mask, g, 0.5 * g)}


GMP = {"update_every": 3, "start_fraction": 0.1, "end_fraction": 0.6}
CASES: dict[str, tuple[str, dict[str, Any], Callable[..., Any], Callable[..., Any]]] = {
    "gmp": ("gmp", GMP, gmp, of_kept),
    "gmp layerwise": ("gmp", {**GMP, "constraint": "layerwise"}, gmp_layerwise, of_kept),
    "dnw": ("dnw", {}, dnw, of_all),
    "st3": ("st3", {}, st3, of_all),
    "st3 sigma": ("st3", {"sigma": True}, st3_sigma, of_all),
    "feather": ("feather", {}, feather, of_all),
    "feather halved": ("feather", {"theta": 0.5}, feather, halved),
    "edge_popup": ("edge_popup", {}, edge_popup, of_scores),
    "edge_popup constant": ("edge_popup", {"init": "signed_constant"}, edge_popup, of_scores),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_the_equations_in_float64(case: str) -> None:
    name, settings, rule, slopes = CASES[case]
    ours = trained(name, density=0.2, **settings)
    state, mask, theta = next(ours)
    reference = Reference(state, frozen_biases=name == "edge_popup")
    wanted = torch.ones(1200, dtype=torch.bool)
    masks = set()
    for step, (images, labels) in enumerate([*batches(torch.float64), (None, None)]):
        wanted, shown = rule(reference, step, wanted)
        assert torch.equal(mask, wanted), step
        # Feather's theta has an infinite slope at the threshold: there its cube is what rounding leaves alone.
        power = 3 if name == "feather" else 1
        torch.testing.assert_close(theta.double() ** power, shown**power, rtol=0, atol=1e-6)
        for key, value in reference.state.items():
            torch.testing.assert_close(state[key].double(), value, rtol=0, atol=1e-6)
        masks.add(tuple(mask.tolist()))
        if images is not None:
            gradient = reference.step(shown, images, labels)
            for key, g in slopes(gradient, wanted, reference.state).items():
                reference.state[key] = reference.moved(key, reference.state[key], g)
            state, mask, theta = next(ours)
    assert int(mask.sum()) in (240, sum(KEPT["layerwise"]))
    assert len(masks) >= 3, "the mask hardly ever changed: nothing was shown"


def form_of(name: str, epochs: int, **settings: Any) -> tuple[Any, Slice]:
    method, phase = method_of(name, network(), epochs, **settings)
    return method.reparametrization(phase), Slice.even(method.weights, single())


def test_st3s_density_at_ten_points_is_the_cubic_of_the_papers_window() -> None:
    form, _ = form_of("st3", 1000, density=0.1)  # epochs 5 to 50 of 100, as 10 steps each
    points = [(0, 0.0), (50, 0.0), (95, 0.271), (140, 0.488), (185, 0.657), (275, 0.875), (320, 0.936), (410, 0.992),
              (500, 1.0), (999, 1.0)]  # fmt: skip
    for updates, share in points:
        assert form.density_at(updates) == pytest.approx(1 - 0.9 * share, abs=1e-12), updates


def test_gmps_mask_at_ten_points_has_the_cubic_density_of_the_papers_window() -> None:
    form, part = form_of("gmp", 1000, density=0.1, start_fraction=0.2, end_fraction=0.79, update_every=59)
    state = form.start(torch.randn(part.total, generator=torch.Generator().manual_seed(1)), part)
    sparsity = {199: 0, 200: 0, 259: 0.271, 300: 0.271, 318: 0.488, 377: 0.657, 495: 0.875, 672: 0.992, 790: 1, 900: 1}
    kept = {}
    for updates in range(1, 1001):
        form.constrain(state, part, updates)
        kept[updates] = int(state["mask"].sum())
    for updates, share in sparsity.items():
        assert kept[updates] == round((1 - 0.9 * share) * 1200), updates


def test_feathers_density_is_reached_after_half_of_the_training() -> None:
    form, _ = form_of("feather", 100, density=0.02)
    assert [form.density_at(t) for t in (0, 50, 100)] == [1.0, 0.02, 0.02]
    assert form.density_at(25) == pytest.approx(1 - 0.98 * 0.875)
    assert form.slope == 0.5
    assert form_of("feather", 100, density=0.05)[0].slope == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cube_roots_are_right_to_the_last_digits(dtype: torch.dtype) -> None:
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 5
    x = torch.cat([x.clamp(min=1e-30), torch.tensor([0.0, 1e-36, 8.0, 1e30], dtype=torch.float64)]).to(dtype)
    wanted = torch.from_numpy(np.cbrt(x.double().numpy()))
    assert float(((cube_root(x).double() - wanted) / wanted.clamp(min=1e-20)).abs().max()) < torch.finfo(dtype).eps


def test_edge_popups_network_is_drawn_for_the_fan_that_is_kept() -> None:
    for init in ("kaiming_normal", "signed_constant"):
        net = build_model_with_bias()
        method, phase = method_of("edge_popup", net, density=0.3, init=init)
        method.prepare()
        for name, weight in method.weights.items():
            wanted = math.sqrt(2 / (0.3 * weight[0].numel()))
            if init == "signed_constant":
                assert torch.equal(weight.abs(), torch.full_like(weight, wanted)), name
                assert abs(float(weight.detach().sign().mean())) < 4 / weight.numel() ** 0.5
            else:
                assert float(weight.detach().std()) == pytest.approx(wanted, rel=4 / weight.numel() ** 0.5), name
        for name, parameter in net.named_parameters():
            if name not in method.weights:
                assert bool((parameter == float(not name.endswith("bias"))).all()), name
        assert [g.name for g in method.enter(phase).groups] == ["prunable"], "biases and batch norm learn"
        assert [n for n, p in net.named_parameters() if p.requires_grad] == list(method.weights)


def build_model_with_bias() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(16, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 100)
    )


def test_edge_popups_scores_start_uniform_within_one_over_the_root_of_the_fan() -> None:
    form, part = form_of("edge_popup", 1, density=0.3)
    score = form.start(torch.ones(part.total), part)["score"]
    for s in part.segments:
        own = score[s.start : s.start + s.numel] * math.sqrt(part.layout.shapes[s.name][1:].numel())
        assert 0.9 < float(own.abs().max()) < 1
        assert abs(float(own.mean())) < 4 / (3 * s.numel) ** 0.5


def test_the_dense_variant_of_dnw_leaves_the_first_layer_alone() -> None:
    method, _ = method_of("dnw", network(), density=0.2, dense_layers=("0.weight",))
    assert list(method.weights) == ["2.weight", "6.weight"]


def test_rescaling_layers_before_the_first_step_cuts_a_new_mask() -> None:
    form, part = form_of("dnw", 1, density=0.2, constraint="global")
    state = form.start(torch.randn(part.total, generator=torch.Generator().manual_seed(1)), part)
    form.scale(state, part, {"0.weight": 10.0})
    assert torch.equal(state["mask"], cut(state["weight"].abs(), 240))


def test_a_minimum_per_layer_holds_and_one_above_the_budget_is_refused() -> None:
    settings = {"density": 0.02, "constraint": "global"}
    form, part = form_of("dnw", 1, **settings, min_per_layer=8)
    weight = torch.randn(part.total, generator=torch.Generator().manual_seed(1))
    weight[: part.segments[0].numel] *= 1e-3
    state = form.start(weight, part)
    assert int(state["mask"].sum()) == 24
    assert part.layer_sums(state["mask"]).tolist() == [8, 8, 8]
    form, part = form_of("dnw", 1, **settings, min_per_layer=9)
    with pytest.raises(InputError, match=r"^mask\.min_per_layer = 9: 3 layers need 27 weights"):
        form.start(weight, part)
