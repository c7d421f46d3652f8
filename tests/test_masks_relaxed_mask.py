"""Does the relaxed mask have the paper's distribution and gradients, in every form, at both ends of s and small tau?"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ghostmask.engine.compiled import load_kernels
from ghostmask.masks.kernels import relaxed_mask as module
from ghostmask.masks.kernels.noise import noise_key, random_words
from ghostmask.masks.kernels.relaxed_mask import EPS, gradients_, masked_, relaxed_mask

KEY = noise_key(seed=3, step=14, sample=1)
FIRST, N = 5 * 1024 + 300, 9000


@pytest.fixture(params=["compiled", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the form that is in use: on the CPU there are two."""
    if request.param == "torch":
        monkeypatch.setattr(module, "kernels_on", lambda device, name: None)
    else:
        assert load_kernels("ghostmask.masks.kernels.relaxed_mask_cpu") is not None
    return str(request.param)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(weights, probabilities, gradients), many probabilities at exactly 0 and 1."""
    g = torch.Generator().manual_seed(11)
    w, gradient = torch.randn(2, N, generator=g)
    return w, (torch.rand(N, generator=g) * 1.4 - 0.2).clamp(0, 1), gradient


def masked(w: Tensor, s: Tensor, tau: float, first: int = FIRST, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(w.shape, math.nan, dtype=dtype)
    masked_(out, w, s, first, KEY, tau)
    return out


def gradients(g: Tensor, w: Tensor, s: Tensor, tau: float, first: int = FIRST) -> tuple[Tensor, Tensor]:
    grad_w, grad_s = g.clone(), torch.full_like(w, math.nan)
    gradients_(grad_w, w, s, first, KEY, tau, grad_s)
    return grad_w, grad_s


def reference(tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """(w m, dL/dw, dL/ds) in float64, straight from eq. 4 with autograd, dL/ds bounded as D54 has it."""
    w, s, gradient = (t.double() for t in inputs())
    # The limits of p are those of float32: 1 - 1e-6 is 1 - 1.0133e-6 there.
    p = s.float().clamp(EPS, 1 - EPS).double()
    w.requires_grad_(), p.requires_grad_()
    u = (random_words(KEY, FIRST, N, "cpu") | 1).double() / 2**32
    x = (p.log() - (1 - p).log() + u.log() - (1 - u).log()) / tau
    out = w * x.sigmoid()
    grad_w, grad_s = torch.autograd.grad(out, [w, p], gradient)
    return out.detach(), grad_w, torch.where(s <= 0, 0.0, grad_s * 4 * (p * (1 - p)).detach())


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.03])
@pytest.mark.usefixtures("form")
def test_mask_and_gradients_equal_float64_autograd(tau: float) -> None:
    w, s, g = inputs()
    assert int((s == 0).sum()) > 1000 < int((s == 1).sum())
    ours = (masked(w, s, tau), *gradients(g, w, s, tau))
    for kind, part, expected in zip(("w m", "dL/dw", "dL/ds"), ours, reference(tau), strict=True):
        # At small tau the rounding of s itself, 6e-8 relative, is amplified by 1 / tau.
        allowed = 1e-5 * max(1.0, 0.1 / tau) * (expected.abs() + 1)
        assert ((part.double() - expected).abs() <= allowed).all(), kind


@pytest.mark.parametrize("tau", [1.0, 0.2, 0.03])
def test_compiled_form_equals_the_torch_form(monkeypatch: pytest.MonkeyPatch, tau: float) -> None:
    w, s, g = inputs()
    ours = (masked(w, s, tau), *gradients(g, w, s, tau))
    monkeypatch.setattr(module, "kernels_on", lambda device, name: None)
    theirs = (masked(w, s, tau), *gradients(g, w, s, tau))
    # dL/ds reaches values where the rounding of a large logarithm shows, in either form.
    for a, b, allowed in zip(ours, theirs, (5e-7, 5e-7, 3e-6), strict=True):
        assert ((a - b).abs() <= allowed * (b.abs() + 1)).all()


@pytest.mark.usefixtures("form")
def test_a_weight_has_the_same_bits_in_every_slice() -> None:
    """Any first index and any cut: vector loops and their remainders, whole blocks and parts of one."""
    w, s, g = inputs()
    for tau, dtype in ((0.5, torch.float32), (0.03, torch.bfloat16)):
        whole = (masked(w, s, tau, dtype=dtype), *gradients(g, w, s, tau))
        edges = [0, 1, 2, 700, 723, 724, 725, 1747, 1748, 1749, 1765, 2500, 2531, 6000, 8999, N]
        parts = []
        for begin, end in itertools.pairwise(edges):
            own = slice(begin, end)
            out = masked(w[own], s[own], tau, FIRST + begin, dtype)
            parts.append((out, *gradients(g[own], w[own], s[own], tau, FIRST + begin)))
        for one, many in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(many))


@pytest.mark.usefixtures("form")
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    w, s, g = (t.repeat(8) for t in inputs())
    whole = (masked(w, s, 0.5), *gradients(g, w, s, 0.5))
    before = torch.get_num_threads()
    monkeypatch.setattr("ghostmask.masks.kernels.relaxed_mask_cpu.SMALLEST_RANGE", 1)
    torch.set_num_threads(3)
    parts = (masked(w, s, 0.5), *gradients(g, w, s, 0.5))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.usefixtures("form")
def test_key_and_first_index_decide_the_noise() -> None:
    w, s = torch.ones(2000), torch.full((2000,), 0.5)
    outs = [masked(w, s, 0.5), masked(w, s, 0.5, FIRST + 1)]
    for key in (0, 1, 2**63, 2**64 - 1):
        outs.append(torch.empty(2000))
        masked_(outs[-1], w, s, FIRST, key, 0.5)
    assert all((a != b).float().mean() > 0.99 for a, b in itertools.combinations(outs, 2))


@pytest.mark.usefixtures("form")
def test_bfloat16_is_the_rounding_of_float32() -> None:
    w, s, _ = inputs()
    w[:4], s[:4] = torch.tensor([0.0, -1e-30, 3e38, 1.0]), torch.tensor([0.5, 0.5, 1.0, math.nan])
    s[4:6] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # nan that rounds up to zero
    assert torch.equal(
        masked(w, s, 0.5, dtype=torch.bfloat16).nan_to_num(7), masked(w, s, 0.5).bfloat16().nan_to_num(7)
    )


@pytest.mark.usefixtures("form")
def test_an_empty_slice_is_left_alone() -> None:
    empty = torch.empty(0)
    masked_(empty, empty, empty, 1500, KEY, 1.0)
    gradients_(empty, empty, empty, 1500, KEY, 1.0, empty)


@pytest.mark.parametrize("tau", [1.0, 0.03])
@pytest.mark.usefixtures("form")
def test_a_nan_probability_is_not_hidden_and_harms_no_neighbour(tau: float) -> None:
    w, s, g = inputs()
    expected = masked(w, s, tau), *gradients(g, w, s, tau)
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, -0x400000], dtype=torch.int32)  # nan is written in many ways
    bad = torch.tensor([5, 1000, 2048, N - 1])
    s[bad] = bits.view(torch.float32)
    for part, other in zip((masked(w, s, tau), *gradients(g, w, s, tau)), expected, strict=True):
        assert part.isnan().nonzero().flatten().tolist() == bad.tolist()
        other[bad] = math.nan
        assert torch.equal(part.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.usefixtures("form")
def test_no_nan_at_the_ends_of_everything_and_normal_numbers_in_the_middle() -> None:
    ends = torch.tensor([0.0, 1e-45, EPS, 0.5, 1 - EPS, 1 - 2**-24, 1.0]).repeat(5000)
    weights = torch.tensor([0.0, 1e-30, -1.0, 1e30, 3.0]).repeat_interleave(7000)
    results = masked(weights, ends, 0.03), *gradients(torch.ones(35_000), weights, ends, 0.03)
    assert all(t.isfinite().all() for t in results)
    # A processor takes a hundred times as long for numbers below 2^-126, and at small tau most masks are near 0 or 1.
    w, s, g = torch.full((N,), 1e-3), inputs()[1], torch.full((N,), 1e-6)
    assert all(t[s > 0].min() > 2.0**-126 for t in (masked(w, s, 0.03), *gradients(g, w, s, 0.03)))


@pytest.mark.usefixtures("form")
def test_a_probability_at_one_stays_alive_and_one_at_zero_does_not() -> None:
    n = 300_000
    ones = torch.ones(n)
    for s in (1.0, 1 - 1e-7, 1e-7):
        _, slope = gradients(ones, ones, torch.full((n,), s), 1.0)
        assert slope.isfinite().all()
        assert (slope > 0).float().mean() > 0.99
    assert (gradients(ones, ones, torch.zeros(n), 1.0)[1] == 0).all()


@pytest.mark.usefixtures("form")
def test_noise_is_logistic() -> None:
    """Kolmogorov-Smirnov, n = 1e6: with s = 1/2 and tau = 1 the mask is sigmoid(L), uniform if L is Logistic(0, 1)."""
    n = 1_000_000
    m = masked(torch.ones(n), torch.full((n,), 0.5), 1.0)
    order, steps = m.double().sort().values, torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((order - steps[:-1]).abs(), (order - steps[1:]).abs()).max()
    assert distance < 1.95 / n**0.5  # p = 0.001
    assert m.min() > 0
    assert m.max() <= 1


@pytest.mark.parametrize("s", [1e-4, 0.01, 0.5, 0.99, 1 - 1e-4])
@pytest.mark.parametrize("tau", [1.0, 0.03])
def test_a_mask_exceeds_one_half_with_probability_s(s: float, tau: float) -> None:
    n = 1_000_000
    m = masked(torch.ones(n), torch.full((n,), s), tau)
    assert abs(int((m >= 0.5).sum()) - n * s) <= 4 * math.sqrt(n * s * (1 - s))


def test_mean_gradient_of_a_probability_is_the_derivative_of_the_mean_mask() -> None:
    n = 500_000
    for s in (0.2, 0.7):
        _, slope = gradients(torch.ones(n), torch.ones(n), torch.full((n,), s), 0.5)
        above, below = (
            float(relaxed_mask(torch.full((n,), s + h, dtype=torch.float64), KEY, 0.5, FIRST)[0].mean())
            for h in (1e-4, -1e-4)
        )
        assert float(slope.double().mean()) / (4 * s * (1 - s)) == pytest.approx((above - below) / 2e-4, rel=1e-3)


def test_what_is_no_float32_vector_is_refused() -> None:
    w = torch.ones(4)
    for out, weight in ((w, w.double()), (w.double(), w), (w.half(), w), (w.view(2, 2), w), (torch.ones(8)[::2], w)):
        with pytest.raises(ValueError, match="give contiguous float32 vectors"):
            masked_(out, weight, w, 0, KEY, 1.0)
    with pytest.raises(ValueError, match="give contiguous float32 vectors"):
        gradients_(w, w, w, 0, KEY, 1.0, w.bfloat16())
    with pytest.raises(ValueError, match="give vectors of one length"):
        masked_(torch.ones(3), w, w, 0, KEY, 1.0)
