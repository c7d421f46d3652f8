"""Probabilities of kernels: gradients and projection as float64 has them, and the same bits on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from granular import scores_of, units
from mask_reference import bounded, relaxed_mask
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.kernels.noise import noise_key, uniforms
from ghostmask.masks.relaxed import Search
from ghostmask.masks.relaxed_kernels import RelaxedKernels
from ghostmask.masks.units.blocks import Kernels

DRAW = Draw(3, 17, 1)
DENSITY = 0.3
CASES = [("bottleneck", "global", False), ("bottleneck", "layerwise", False), ("depthwise", "global", True)]


def kernels(name: str, flops: bool) -> tuple[Kernels, dict[str, Tensor]]:
    made, weights, _, _ = units(name, granularity="kernel", budget="flops" if flops else "weights")
    return Kernels(made.lengths, made.uses, by_layer=False), {n: w.detach().clone() for n, w in weights.items()}


def of_kernels(made: Kernels, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """(kernels, weights of one) of each weight."""
    return {n: t.reshape(-1, made.lengths[n]) for n, t in tensors.items()}


def step(world: World, made: Kernels, weights: dict[str, Tensor], gradient: dict[str, Tensor], constraint: str) -> Any:
    """What one update computes, by name and weight, on this many ranks, whose slices cut kernels anywhere."""
    part = Slice(Layout({n: w.shape for n, w in weights.items()}, world.size, 500 if world.size > 1 else 0), world)
    form = RelaxedKernels(Search(DENSITY, constraint, 0.03, 0, 1, 2, 4, 3, made), Sgd(), 0.3, made)
    form.temperature, form.density = 0.6, DENSITY
    form.watching = True
    state = form.start(part.cut(weights), part)
    drawn = {n: (t[:, :1] * 1.2).clamp(0, 1).expand_as(t) for n, t in of_kernels(made, scores_of(weights, 4)).items()}
    state["probability"].copy_(part.cut({n: t.reshape(weights[n].shape) for n, t in drawn.items()}))
    found = {"s": part.gathered(state["probability"]), "theta": part.gathered(form.weights(state, part, DRAW))}
    slopes = form.gradients(part.cut(gradient), state, part, DRAW)
    found |= {f"d {name}": part.gathered(slope) for name, slope in slopes.items()}
    state["probability"].add_(slopes["probability"].sign(), alpha=0.1)
    found["z"] = part.gathered(state["probability"])
    form.constrain(state, part, 1)
    found["projected"] = part.gathered(state["probability"])
    found["mask"], found["sample"] = part.gathered(form.mask(state, part)), part.gathered(form.sampled(state, part, 1))
    return found | {"numbers": {"v": form.threshold, "share": form.limit_share}}


@pytest.mark.parametrize(("name", "constraint", "flops"), CASES)
def test_an_update_of_kernel_probabilities_is_that_of_float64_on_any_ranks(
    name: str, constraint: str, flops: bool
) -> None:
    made, weights = kernels(name, flops)
    assert {1, 9} <= set(made.lengths.values())
    gradient = {n: t - 0.8 for n, t in scores_of(weights).items()}
    found = step(single(), made, weights, gradient, constraint)
    begin, w, g = 0, of_kernels(made, weights), of_kernels(made, gradient)
    spent, projected = 0.0, of_kernels(made, found["projected"])
    for n in weights:
        first = of_kernels(made, found["s"])[n][:, 0]
        s = first.double().requires_grad_()
        m = relaxed_mask(s, begin, DRAW, 0.6)[:, None]
        (slope,) = torch.autograd.grad((w[n].double() * m * g[n].double()).sum(), s)
        assert torch.allclose(found["theta"][n].double().reshape(w[n].shape), w[n].double() * m, rtol=1e-5, atol=1e-7)
        d_weight = of_kernels(made, found["d weight"])[n].double()
        assert torch.allclose(d_weight, (g[n].double() * m).detach(), rtol=1e-4, atol=1e-6)
        d_s = of_kernels(made, found["d probability"])[n].double()
        assert torch.allclose(d_s[:, 0], bounded(slope, first.double()), rtol=1e-4, atol=1e-5)
        assert not bool(d_s[:, 1:].any()), "a probability counts once in the norm"
        z = of_kernels(made, found["z"])[n][:, 0].double()
        v = found["numbers"]["v"] if constraint == "global" else (z - projected[n][:, 0]).median()
        assert torch.allclose(projected[n].double(), (z - v).clamp(0, 1)[:, None].expand_as(w[n]), atol=1e-6)
        cost = projected[n].double().sum() * (made.uses or {}).get(n, 1)
        whole = weights[n].numel() * (made.uses or {}).get(n, 1)
        assert constraint == "global" or float(cost / whole) == pytest.approx(DENSITY, rel=1e-5)
        spent += float(cost) - DENSITY * whole
        uniform = uniforms(noise_key(3, -1, 1), begin, len(z), "cpu")
        assert torch.equal(
            of_kernels(made, found["sample"])[n], (uniform < projected[n][:, 0])[:, None].expand_as(w[n])
        )
        begin += weights[n].numel()
    assert spent == pytest.approx(0, abs=1e-2)
    for ranks in (2, 4):
        for other in run_distributed(step, ranks, made, weights, gradient, constraint):
            for key, value in found.items():
                for n, t in value.items():
                    same = torch.allclose(other[key][n], t) if n == "share" else torch.equal(other[key][n], t)
                    assert same, (ranks, key, n)


@pytest.mark.parametrize(("name", "constraint", "flops"), CASES)
def test_the_most_probable_kernels_stay_within_the_budget(name: str, constraint: str, flops: bool) -> None:
    made, weights = kernels(name, flops)
    found = step(single(), made, weights, {n: t - 0.8 for n, t in scores_of(weights).items()}, constraint)
    masks, s = of_kernels(made, found["mask"]), of_kernels(made, found["projected"])
    assert all(torch.equal(mask.any(1), mask.all(1)) for mask in masks.values())
    groups = [list(masks)] if constraint == "global" else [[n] for n in masks]
    for names in groups:
        kept = min(float(s[n][:, 0][masks[n][:, 0]].min()) for n in names if masks[n].any())
        lost = max(float(s[n][:, 0][~masks[n][:, 0]].max()) for n in names)
        assert kept >= lost, "ranked by the probability itself, not by its share of the layer's mean"
        costs = {n: made.lengths[n] * (made.uses or {}).get(n, 1) for n in names}
        left = round(DENSITY * sum(len(masks[n]) * costs[n] for n in names))
        left -= sum(int(masks[n][:, 0].sum()) * costs[n] for n in names)
        assert 0 <= left < max(costs.values())
