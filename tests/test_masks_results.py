"""Methods whose density is a result, and powers of weights: held against the papers' equations in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.special import ndtri
from small_steps import LR, SmallStep, assert_equal, flat, slope_by_differences, uniforms
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw, Plain
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import single
from ghostmask.masks.elementwise import elementwise
from ghostmask.masks.methods.dnw import Largest
from ghostmask.masks.methods.gmp import Shrinking
from ghostmask.masks.methods.l0 import ChannelGates, WeightGates
from ghostmask.masks.methods.sparse_vd import Gaussian
from ghostmask.masks.methods.str import TrainedThresholds
from ghostmask.masks.power import Powered, powered
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.masks.units.blocks import Kernels

RULE = Sgd(0.9, 1e-2)
CHANNELS = [18] * 4 + [16] * 3
"""Weights of each output channel of the small network."""


def moved_by(optimizers: list[torch.optim.Optimizer], loss: Tensor) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def sgd(*parameters: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, LR, momentum=0.9, weight_decay=1e-2)


def soft(w: Tensor, r: Tensor) -> Tensor:
    return torch.sign(w) * torch.relu(w.abs() - torch.sigmoid(r[torch.tensor([0] * 72 + [1] * 48)]))


def test_str_takes_the_papers_steps() -> None:
    small = SmallStep()
    w = flat(small.initial).requires_grad_()
    r = torch.full((2,), -4.0, dtype=torch.float64, requires_grad=True)
    optimizers = [sgd(w), torch.optim.SGD([r], LR, momentum=0.9, weight_decay=0.2)]
    pruned = []
    for theta, masks, state in small.trained(TrainedThresholds(RULE, Sgd(0.9, 0.2), -4.0)):
        expected = soft(w, r)
        assert_equal(flat(theta), expected, "theta")
        moved_by(optimizers, small.loss(small.by_name(expected)))
        assert_equal(state["r"], r, "r")
        assert torch.equal(flat(masks) > 0, w.abs() > torch.sigmoid(r)[torch.tensor([0] * 72 + [1] * 48)])
        pruned.append(len(w) - int(flat(masks).sum()))
    assert pruned[-1] > pruned[0], "no threshold moved"


def test_the_gradient_of_strs_thresholds_is_that_of_finite_differences() -> None:
    small = SmallStep()
    form = TrainedThresholds(RULE, RULE, -2.5)
    part = Slice.even(small.initial, single())
    state = form.start(flat(small.initial).float(), part)
    theta = small.by_name(form.weights(state, part, Draw(0, 0, 0))).items()
    inputs = {n: t.clone().requires_grad_() for n, t in theta}
    gradient = torch.autograd.grad(small.loss(inputs), list(inputs.values()))
    found = form.gradients(torch.cat([g.reshape(-1) for g in gradient]), state, part, Draw(0, 0, 0))
    w = flat(small.initial)
    wanted = slope_by_differences(lambda r: small.loss(small.by_name(soft(w, r))), state["r"].double())
    torch.testing.assert_close(found["r"].double(), wanted, rtol=1e-4, atol=1e-8)
    assert wanted.abs().min() > 1e-4


def test_scaled_thresholds_scale_what_the_network_sees() -> None:
    small = SmallStep()
    form = TrainedThresholds(RULE, RULE, -3.0)
    part = Slice.even(small.initial, single())
    state = form.start(flat(small.initial).float(), part)
    before = form.weights(state, part, Draw(0, 0, 0)).clone()
    form.scale(state, part, {"0.weight": 0.25, "3.weight": 2.0})
    factors = torch.tensor([0.25] * 72 + [2.0] * 48)
    torch.testing.assert_close(form.weights(state, part, Draw(0, 0, 0)), before * factors, rtol=1e-5, atol=1e-7)
    state["r"].fill_(-3200.0)
    form.scale(state, part, {"0.weight": 0.5})
    assert state["r"].tolist() == pytest.approx([-3200.7, -3200.0], abs=0.01)


def divergence(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q || log-uniform), as the paper writes it."""
    x = (log_variance - torch.log(mu**2 + 1e-8)).clamp(-8, 8)
    minus = 0.63576 * torch.sigmoid(1.8732 + 1.48695 * x) - 0.5 * torch.log(1 + torch.exp(-x)) - 0.63576
    return -minus.sum()


def test_sparse_vd_takes_the_papers_steps_with_a_growing_penalty() -> None:
    small = SmallStep()
    mu = flat(small.initial).requires_grad_()
    log_variance = torch.full_like(mu, -5.0).detach().requires_grad_()
    optimizers = [sgd(mu), torch.optim.Adam([log_variance], 0.2)]
    kept = []
    form = Gaussian(RULE, 0.2 / LR, -5.0, 0.05, ramp=12)
    for step, (theta, masks, state) in enumerate(small.trained(form)):
        noise = torch.from_numpy(ndtri(uniforms(step, len(mu)).numpy()))
        expected = mu + torch.exp(log_variance / 2) * noise
        assert_equal(flat(theta), expected, "theta")
        kl = 0.05 * min(1.0, step / 12) * divergence(mu, log_variance)
        moved_by(optimizers, small.loss(small.by_name(expected)) + kl)
        assert_equal(state["weight"], mu, "mu")
        assert torch.equal(flat(masks) > 0, log_variance - torch.log(mu**2 + 1e-8) < 3)
        kept.append(int(flat(masks).sum()))
    assert kept[-1] < kept[0], "nothing was pruned"


def test_a_scaled_noise_scales_what_the_network_sees() -> None:
    small, draw = SmallStep(), Draw(5, 2, 0)
    form, part = Gaussian(RULE, 1.0, -3.0, 0.0), Slice.even(small.initial, single())
    state = form.start(flat(small.initial).float(), part)
    before = form.weights(state, part, draw)
    form.scale(state, part, {"3.weight": 0.25})
    factors = torch.tensor([1.0] * 72 + [0.25] * 48)
    torch.testing.assert_close(form.weights(state, part, draw), before * factors, rtol=1e-5, atol=1e-6)


def gate(logit: Tensor) -> Tensor:
    return (1.2 * torch.sigmoid(logit) - 0.1).clamp(0, 1)


@pytest.mark.parametrize(("form", "sizes"), [(WeightGates, [1] * 120), (ChannelGates, CHANNELS)])
def test_l0_takes_the_papers_steps(form: Callable[..., WeightGates], sizes: list[int]) -> None:
    small, repeats = SmallStep(), torch.tensor(sizes)
    w = flat(small.initial).requires_grad_()
    log_odds = torch.full((len(sizes),), -1.5, dtype=torch.float64, requires_grad=True)
    optimizers = [sgd(w), torch.optim.Adam([log_odds], 0.1)]
    kept = []
    for step, (theta, masks, state) in enumerate(small.trained(form(RULE, 0.1 / LR, -1.5, 0.02))):
        u = uniforms(step, len(sizes))
        expected = w * gate((torch.log(u / (1 - u)) + log_odds) * 1.5).repeat_interleave(repeats)
        assert_equal(flat(theta), expected, "theta")
        opened = torch.sigmoid(log_odds - 2 / 3 * math.log(0.1 / 1.1)) * repeats
        moved_by(optimizers, small.loss(small.by_name(expected)) + 0.02 * opened.sum())
        assert_equal(state["weight"], w, "w")
        assert_equal(state["log_odds"], log_odds, "log a")
        assert torch.equal(flat(masks) > 0, (gate(log_odds) > 0).repeat_interleave(repeats))
        kept.append(int(flat(masks).sum()))
    assert kept[-1] < kept[0] == 120, "nothing was pruned"


@pytest.mark.parametrize(("form", "sizes"), [(WeightGates, [1] * 120), (ChannelGates, CHANNELS)])
def test_the_gradient_of_l0s_gates_is_that_of_finite_differences(
    form: Callable[..., WeightGates], sizes: list[int]
) -> None:
    small, repeats, draw = SmallStep(), torch.tensor(sizes), Draw(5, 3, 0)
    gates = form(RULE, 1.0, 0.3, 0.02)
    part = Slice.even(small.initial, single())
    state = gates.start(flat(small.initial).float(), part)
    inputs = {n: t.clone().requires_grad_() for n, t in small.by_name(gates.weights(state, part, draw)).items()}
    gradient = torch.autograd.grad(small.loss(inputs), list(inputs.values()))
    found = gates.gradients(torch.cat([g.reshape(-1) for g in gradient]), state, part, draw)
    u, w = uniforms(3, len(sizes)), flat(small.initial)

    def loss(log_odds: Tensor) -> Tensor:
        theta = w * gate((torch.log(u / (1 - u)) + log_odds) * 1.5).repeat_interleave(repeats)
        opened = torch.sigmoid(log_odds - 2 / 3 * math.log(0.1 / 1.1)) * repeats
        return small.loss(small.by_name(theta)) + 0.02 * opened.sum()

    wanted = slope_by_differences(loss, state["log_odds"].double())
    torch.testing.assert_close(found["log_odds"].double(), wanted, rtol=1e-4, atol=1e-6)
    assert wanted.abs().max() > 1e-3


def test_a_delivered_gate_has_no_noise_and_a_closed_one_nothing() -> None:
    small = SmallStep()
    form = WeightGates(RULE, 1.0, 0.0, 0.0)
    part = Slice.even(small.initial, single())
    state = form.start(flat(small.initial).float(), part)
    state["log_odds"].copy_(torch.linspace(-5, 5, 120))
    expected = flat(small.initial) * gate(state["log_odds"].double())
    torch.testing.assert_close(form.evaluation_weights(state, part).double(), expected, rtol=1e-5, atol=1e-6)


def test_gmp_on_powers_takes_the_papers_steps_and_starts_at_the_initialisation() -> None:
    small = SmallStep()
    initial = flat(small.initial)
    v = (initial.sign() * initial.abs().sqrt()).requires_grad_()
    optimizer, mask = sgd(v), torch.ones(120, dtype=torch.bool)
    form = powered(Shrinking(RULE, Budget(0.25), first=2, last=14, every=4), 2.0)
    for step, (theta, masks, state) in enumerate(small.trained(form)):
        expected = v * v.abs() * mask
        assert_equal(flat(theta), expected, "theta")
        if step == 0:
            assert_equal(flat(theta), initial, "the initialisation")
        moved_by([optimizer], small.loss(small.by_name(expected)))
        assert_equal(state["weight"], v.detach(), "v")
        if step + 1 in (2, 6, 10, 14):
            share = 0.25 + 0.75 * (1 - (step - 1) / 12) ** 3
            of_theta = (v * v.abs()).abs()
            mask = of_theta >= of_theta.sort(descending=True).values[round(share * 120) - 1]
        assert torch.equal(flat(masks) > 0, mask)
    assert int(mask.sum()) == 30


def test_whole_kernels_are_ranked_by_what_the_network_sees_and_not_by_what_is_trained() -> None:
    small = SmallStep()
    budget = Budget(0.4, units=Kernels({"0.weight": 9, "3.weight": 1}, None))
    part, other = Slice.even(small.initial, single()), 0
    for _, masks, state in small.trained(powered(Largest(RULE, budget), 4.0)):
        v = state["weight"]
        assert torch.equal(flat(masks) > 0, largest(part, elementwise(lambda x: x.abs().pow(4.0), v), budget))
        other += int((largest(part, v.abs(), budget) ^ (flat(masks) > 0)).sum())
    assert other > 0, "the two are the same here: this test shows nothing"


def test_a_scaled_power_scales_what_the_network_sees() -> None:
    small = SmallStep()
    form, part = Powered(Plain({"weight": RULE}), 3.0), Slice.even(small.initial, single())
    state = form.start(flat(small.initial).float(), part)
    form.scale(state, part, {"0.weight": 0.25})
    expected = flat(small.initial) * torch.tensor([0.25] * 72 + [1.0] * 48)
    assert_equal(form.weights(state, part, Draw(0, 0, 0)), expected, "theta")


def test_a_function_of_elements_gives_the_same_bits_wherever_a_vector_is_cut() -> None:
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(2))
    for function in (torch.sigmoid, torch.log1p, lambda v: v.abs().pow(1.7), torch.special.ndtri):
        whole = elementwise(function, x.abs() / 8)
        for cut in (1, 17, 20_011, 39_937):
            pieces = [elementwise(function, part / 8) for part in (x.abs()[:cut], x.abs()[cut:])]
            assert torch.equal(torch.cat(pieces).nan_to_num(7.0), whole.nan_to_num(7.0))
