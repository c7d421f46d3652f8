"""Does the relaxed mask have the paper's distribution and gradients, on every path, at both ends of s and small tau?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostmask.masks.kernels import relaxed_mask as module
from ghostmask.masks.kernels import relaxed_mask_torch
from ghostmask.masks.kernels.compiled import load_kernels
from ghostmask.masks.kernels.noise import NoiseKey, random_words
from ghostmask.masks.kernels.relaxed_mask import EPS, relaxed_bucket, relaxed_weights
from ghostmask.masks.kernels.relaxed_mask_torch import relaxed_mask

KEY = NoiseKey(seed=3, step=14, sample=1, rank=5)
SHAPES = [(64, 3, 7, 7), (130, 65, 1, 1), (10,), (1000, 33), (1,)]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(weights, probabilities, gradients of the outputs), probabilities down to 0 and up to 1."""
    g = torch.Generator().manual_seed(11)
    weights = [torch.randn(s, generator=g) for s in SHAPES]
    probabilities = [(torch.rand(s, generator=g) * 1.4 - 0.2).clamp(0, 1) for s in SHAPES]
    grads = [torch.randn(s, generator=g) for s in SHAPES]
    return [w.to(dtype) for w in weights], [s.to(dtype) for s in probabilities], [x.to(dtype) for x in grads]


def forward_and_gradients(
    temperature: float, *tensors: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights, probabilities, grads = ([t.clone().requires_grad_() for t in part] for part in tensors)
    out = relaxed_weights(weights, probabilities, KEY, temperature)
    torch.autograd.backward(out, [g.detach() for g in grads])
    return out, [w.grad for w in weights], [s.grad for s in probabilities]  # type: ignore[misc]


def textbook(temperature: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The same in float64, straight from eq. 4 with autograd, the clamp's gradient passed through."""
    weights, probabilities, grads = ([t.requires_grad_() for t in part] for part in inputs(torch.float64))
    out = []
    for number, (w, s) in enumerate(zip(weights, probabilities, strict=True)):
        # The operator's limits are those of float32: 1 - 1e-6 is 1 - 1.0133e-6 there.
        limited = s + (s.detach().float().clamp(EPS, 1 - EPS).double() - s.detach())
        words = random_words(KEY.tensor(), number, 0, w.numel()).double().view(w.shape)
        u = (words + 0.5) / 2**32
        x = (limited.log() - (1 - limited).log() + u.log() - (1 - u).log()) / temperature
        out.append(w * x.sigmoid())
    torch.autograd.backward(out, [g.detach() for g in grads])
    return out, [w.grad for w in weights], [s.grad for s in probabilities]  # type: ignore[misc]


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "kernels_for", lambda tensor, name: None)
    monkeypatch.setattr(relaxed_mask_torch, "CHUNK", 2048)


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.03])
def test_mask_and_gradients_equal_float64_autograd(
    monkeypatch: pytest.MonkeyPatch, path: str, temperature: float
) -> None:
    assert load_kernels("ghostmask.masks.kernels.relaxed_mask_cpu") is not None
    if path == "torch":
        eager(monkeypatch)
    ours, expected = forward_and_gradients(temperature, *inputs()), textbook(temperature)
    for kind, parts, references in zip(("w m", "dL/dw", "dL/ds"), ours, expected, strict=True):
        for part, reference in zip(parts, references, strict=True):
            # 1e-5 of the value (of the tensor's largest, for values that nearly cancel); at small tau the rounding of
            # s itself, 6e-8 relative, is amplified by 1 / tau.
            allowed = 1e-5 * max(1.0, 0.1 / temperature) * (reference.abs() + 1)
            assert ((part.double() - reference).abs() <= allowed).all(), kind


def test_compiled_form_equals_the_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {tau: forward_and_gradients(tau, *inputs()) for tau in (1.0, 0.2, 0.03)}
    eager(monkeypatch)
    for tau, results in compiled.items():
        # dL/ds reaches values where the rounding of a large logarithm shows, in either form.
        for ours, other, allowed in zip(
            results, forward_and_gradients(tau, *inputs()), (1e-6, 1e-6, 3e-6), strict=True
        ):
            for a, b in zip(ours, other, strict=True):
                assert ((a - b).abs() <= allowed * (b.abs() + 1)).all()


def test_kernels_that_do_not_compile_are_a_warning_and_torch_takes_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = forward_and_gradients(0.2, *inputs())

    def broken() -> None:
        raise OSError("no compiler here")

    load_kernels.cache_clear()
    monkeypatch.setattr("ghostmask.masks.kernels.relaxed_mask_cpu.compile_all", broken)
    with pytest.warns(UserWarning, match=r"relaxed_mask_cpu could not be compiled, slower torch code is used.*here"):
        results = forward_and_gradients(0.2, *inputs())
    load_kernels.cache_clear()
    for ours, other in zip(results, expected, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_noise_does_not_depend_on_threads_or_chunks(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    weights, probabilities, _ = inputs()
    whole = relaxed_weights(weights, probabilities, KEY, 0.5)
    before = torch.get_num_threads()
    if path == "torch":
        eager(monkeypatch)
        monkeypatch.setattr(relaxed_mask_torch, "CHUNK", 1 << 20)
        whole = relaxed_weights(weights, probabilities, KEY, 0.5)
        monkeypatch.setattr(relaxed_mask_torch, "CHUNK", 1024)
    else:
        monkeypatch.setattr("ghostmask.masks.kernels.relaxed_mask_cpu.SMALLEST_RANGE", 1)
        torch.set_num_threads(3)
    parts = relaxed_weights(weights, probabilities, KEY, 0.5)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_noise_is_logistic() -> None:
    """Kolmogorov-Smirnov, n = 1e6: with s = 1/2 and tau = 1 the mask is sigmoid(L), uniform if L is Logistic(0, 1)."""
    n = 1_000_000
    (m,) = relaxed_weights([torch.ones(n)], [torch.full((n,), 0.5)], KEY, 1.0)
    order = m.double().sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((order - steps[:-1]).abs(), (order - steps[1:]).abs()).max()
    assert distance < 1.95 / n**0.5  # p = 0.001
    assert m.min() > 0
    assert m.max() <= 1


@pytest.mark.parametrize("s", [1e-4, 0.01, 0.5, 0.99, 1 - 1e-4])
@pytest.mark.parametrize("temperature", [1.0, 0.03])
def test_a_mask_exceeds_one_half_with_probability_s(s: float, temperature: float) -> None:
    n = 1_000_000
    (m,) = relaxed_weights([torch.ones(n)], [torch.full((n,), s)], KEY, temperature)
    assert abs(int((m >= 0.5).sum()) - n * s) <= 4 * math.sqrt(n * s * (1 - s))


def test_mean_gradient_of_a_probability_is_the_derivative_of_the_mean_mask() -> None:
    n = 500_000
    for s in (0.2, 0.7):
        probability = torch.full((n,), s, requires_grad=True)
        relaxed_weights([torch.ones(n)], [probability], KEY, 0.5)[0].sum().backward()
        means = [
            float(
                relaxed_mask(torch.full((n,), s + h, dtype=torch.float64), KEY.tensor(), torch.tensor(0.5), 0)[0].mean()
            )
            for h in (1e-4, -1e-4)
        ]
        assert probability.grad is not None
        assert float(probability.grad.mean()) == pytest.approx((means[0] - means[1]) / 2e-4, rel=1e-3)


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("s", [0.0, 1.0])
def test_probabilities_at_zero_and_one_have_finite_gradients_and_stay_alive(
    monkeypatch: pytest.MonkeyPatch, path: str, s: float
) -> None:
    if path == "torch":
        eager(monkeypatch)
        monkeypatch.setattr(relaxed_mask_torch, "CHUNK", 1 << 20)
    weights, n = torch.ones(3_000_000), 3_000_000
    for temperature in (1.0, 0.1, 0.03):
        probability = torch.full((n,), s, requires_grad=True)
        relaxed_weights([weights], [probability], KEY, temperature)[0].sum().backward()
        grad = probability.grad
        assert grad is not None
        assert grad.isfinite().all()
        # At tau = 1 every weight feels it; at 0.03 about EPS of them do, each 1/EPS as much: the mean stays near 1.
        assert int((grad > 0).sum()) > (0.99 * n if temperature == 1 else 0)


def test_probabilities_leave_one_under_gradient_steps() -> None:
    s = torch.ones(1000, requires_grad=True)
    weights = torch.ones(1000)
    for step in range(20):
        relaxed_weights([weights], [s], NoiseKey(0, step, 0, 0), 1.0)[0].sum().backward()
        with torch.no_grad():
            assert s.grad is not None
            s.sub_(1e-2 * s.grad.sign()).clamp_(0, 1)
            s.grad = None
    assert s.max() < 0.95


def test_no_nan_at_the_ends_of_everything() -> None:
    ends = torch.tensor([0.0, 1e-45, EPS, 0.5, 1 - EPS, 1 - 2**-24, 1.0]).repeat(5000)
    weights = torch.tensor([0.0, 1e-30, -1.0, 1e30, 3.0]).repeat_interleave(7000)
    out, (grad_w,), (grad_s,) = forward_and_gradients(0.03, [weights], [ends], [torch.ones(35_000)])
    assert all(t.isfinite().all() for t in (out[0], grad_w, grad_s))


def test_a_nan_probability_is_not_hidden() -> None:
    (out,) = relaxed_weights([torch.ones(3)], [torch.tensor([0.5, float("nan"), 0.5])], KEY, 1.0)
    assert out.isnan().tolist() == [False, True, False]


def test_layout_is_the_weights_and_results_do_not_depend_on_the_probabilities_layout() -> None:
    shape = (16, 8, 3, 3)
    g = torch.Generator().manual_seed(1)
    w, s, grad = (torch.rand(shape, generator=g) for _ in range(3))
    last = {"memory_format": torch.channels_last}
    results = []
    for probability in (s, s.to(**last)):  # type: ignore[call-overload]
        weight = w.to(**last).requires_grad_()  # type: ignore[call-overload]
        leaf = probability.clone().requires_grad_()
        (out,) = relaxed_weights([weight], [leaf], KEY, 0.5)
        out.backward(grad)
        assert weight.grad is not None
        assert leaf.grad is not None
        assert out.stride() == weight.stride() == weight.grad.stride()
        assert leaf.grad.stride() == leaf.stride()
        results.append((out, weight.grad, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    mask = results[0][1] / grad
    memory = relaxed_weights([torch.ones(w.numel())], [s.permute(0, 2, 3, 1).reshape(-1)], KEY, 0.5)[0]
    assert torch.allclose(mask.permute(0, 2, 3, 1).reshape(-1), memory, rtol=1e-5)


def test_operator_is_registered_as_torch_wants_it() -> None:
    shapes = [(3, 5), (4, 2, 3, 3), (7,)]
    weights, probabilities = ([torch.rand(s, requires_grad=True) for s in shapes] for _ in range(2))
    for dtype, channels_last in ((torch.float32, False), (torch.bfloat16, True)):
        args = (weights, probabilities, KEY.tensor(), torch.tensor(0.7), 2, dtype, channels_last)
        torch.library.opcheck(relaxed_bucket, args)


FLAGS: list[dict[str, Any]] = [
    {},
    {"ban_recompute_not_in_allowlist": False},
    {"aggressive_recomputation": True},
    {"activation_memory_budget": 0.1},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: next(iter(f), "default"))
def test_compiled_backward_uses_the_noise_of_its_forward(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    """torch.compile silently drew fresh noise for ordinary random operators under each of these flags.

    tanh's backward needs w m: under every flag torch runs the operator a second time for it, and would multiply by
    other noise if the operator did not draw the same.
    """
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    s, temperature = torch.full((300,), 0.5), torch.tensor(0.7)
    runs: list[int] = []
    kernels = load_kernels("ghostmask.masks.kernels.relaxed_mask_cpu") or relaxed_mask_torch
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *a: (runs.append(1), forward(*a)))

    @torch.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    def run(w: Tensor, key: Tensor) -> Tensor:
        return (relaxed_weights([w * 1.0], [s], key, temperature)[0].tanh() + w.sin() * 0).sum()

    with functorch.patch(**flags):
        for step in range(3):
            w = torch.ones(300, requires_grad=True)
            key = NoiseKey(0, step, 0, 0).tensor()
            runs.clear()
            run(w, key).backward()
            assert len(runs) == (2 if flags else 1)
            (mask,) = relaxed_weights([torch.ones(300)], [s], key, temperature)
            torch.testing.assert_close(w.grad, mask * (1 - mask.tanh().square()), rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
