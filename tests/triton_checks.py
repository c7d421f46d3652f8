"""Do the Triton kernels compute what the torch forms compute? Run with TRITON_INTERPRET=1: no GPU is needed.

Prints {check: "" or what is wrong} as JSON; tests/test_masks_kernels_triton.py runs it.
"""

from __future__ import annotations

import itertools
import json
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostmask.engine.world import single
from ghostmask.masks.kernels import projection, projection_triton, radix_triton, relaxed_mask, relaxed_mask_triton
from ghostmask.masks.kernels.noise import noise_key, random_words
from ghostmask.masks.scoring import radix

KEY = noise_key(3, 1, 4)
N, FIRST = 9000, 7 * 1024 + 300


def no_kernels(place: Tensor | torch.device, module: str) -> None:
    return None


for module in (projection, relaxed_mask):
    module.kernels_on = no_kernels  # the forms in torch are the reference


@triton.jit
def store_words(first, low_key, high_key, out):
    words = relaxed_mask_triton._words(first, low_key, high_key)
    block = tl.program_id(0) * 4 + tl.arange(0, 4)[:, None]
    for k in tl.static_range(4):
        tl.store(out + block * 1024 + k * 256 + tl.arange(0, 256)[None, :], words[k].to(tl.int64))


def words_are_those_of_the_torch_form() -> None:
    for key in (KEY, 2**63 + 2**31, 2**64 - 1, 1):
        for block in (0, 5, 2**24 - 2, 2**30):  # over the edge between the counter's words, and beyond
            out = torch.empty(8192, dtype=torch.int64)
            store_words[(2,)](block, *relaxed_mask_triton._halves(key), out)
            assert torch.equal(out & 0xFFFFFFFF, random_words(key, block * 1024, 8192, "cpu")), (key, block)


def halves_of_a_key_are_signed_32_bit_numbers() -> None:
    for key in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, KEY):
        low, high = relaxed_mask_triton._halves(key)
        assert all(-(2**31) <= half < 2**31 for half in (low, high))
        assert (low & 0xFFFFFFFF) + ((high & 0xFFFFFFFF) << 32) == key


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """(weights, probabilities, many at 0 and 1, gradients)."""
    g = torch.Generator().manual_seed(1)
    w, gradient = torch.randn(2, N, generator=g)
    return w, (torch.rand(N, generator=g) * 1.4 - 0.2).clamp(0, 1), gradient


TORCH = SimpleNamespace(masked=relaxed_mask.masked_, gradients=relaxed_mask.gradients_)


def masked(form: Any, tau: float, dtype: torch.dtype, begin: int = 0, end: int = N) -> Tensor:
    w, s, _ = (t[begin:end] for t in tensors())
    out = torch.full((end - begin,), float("nan"), dtype=dtype)
    form.masked(out, w, s, FIRST + begin, KEY, tau)
    return out


def gradients(form: Any, tau: float, begin: int = 0, end: int = N) -> tuple[Tensor, Tensor]:
    w, s, g = (t[begin:end] for t in tensors())
    slope = torch.full_like(g, float("nan"))
    form.gradients(g, w, s, FIRST + begin, KEY, tau, slope)
    return g, slope


def close(ours: Tensor, theirs: Tensor, allowed: float) -> None:
    assert ((ours.double() - theirs.double()).abs() <= allowed * (theirs.double().abs() + 1)).all()


def masked_weights_are_those_of_the_torch_form() -> None:
    for tau, dtype in ((1.0, torch.float32), (0.03, torch.float32), (0.5, torch.bfloat16)):
        ours, theirs = (masked(form, tau, dtype) for form in (relaxed_mask_triton, TORCH))
        # The interpreter cuts bfloat16 off where a GPU rounds.
        close(ours, theirs, 1e-6 if dtype == torch.float32 else 2**-7)


def gradients_are_those_of_the_torch_form() -> None:
    for tau in (1.0, 0.2):
        ours, theirs = (gradients(form, tau) for form in (relaxed_mask_triton, TORCH))
        close(ours[0], theirs[0], 1e-6)
        close(ours[1], theirs[1], 3e-6)


def a_weight_has_the_same_bits_in_every_slice() -> None:
    kernels, edges = relaxed_mask_triton, [0, 1, 723, 724, 725, 1748, 6000, N]
    whole = (masked(kernels, 0.3, torch.float32), *gradients(kernels, 0.3))
    parts = [
        (masked(kernels, 0.3, torch.float32, a, b), *gradients(kernels, 0.3, a, b))
        for a, b in itertools.pairwise(edges)
    ]
    assert all(torch.equal(torch.cat(p), one) for p, one in zip(zip(*parts, strict=True), whole, strict=True))


def a_nan_probability_is_not_hidden() -> None:
    w, s, g = torch.ones(3), torch.tensor([0.5, float("nan"), 0.0]), torch.ones(3)
    out, grad_s = torch.empty(3), torch.empty(3)
    relaxed_mask_triton.masked(out, w, s, 1022, KEY, 0.5)
    relaxed_mask_triton.gradients(g, w, s, 1022, KEY, 0.5, grad_s)
    assert [t.isnan().tolist() for t in (out, g, grad_s)] == [[False, True, False]] * 3


def shards() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    odd = torch.tensor([0.0, -0.0, 1.0, 1e-42, 2.0**24, 1e30, float("nan"), float("inf"), float("-inf"), 1 + 2**-23])
    return [torch.randn(9001, generator=g), torch.full((5000,), 0.7), odd, torch.rand(4096, generator=g) * 2]


def tables_are_those_of_the_torch_form() -> None:
    projection_triton.PROGRAMS = 3  # so that a program goes round more than once
    for z in shards():
        for base, shift, bins in ((0, 20, 1216), (1016 * 1024 + 100, 10, 1024), (0x3F333333 - 200, 0, 1024)):
            first = torch.tensor(base)
            expected = projection.histogram([z], first, shift, bins)
            assert torch.equal(projection_triton.histogram(z, first, shift, bins), expected), (base, shift)


def brackets_are_those_of_the_torch_form() -> None:
    kinds = [z.nan_to_num(0.5, posinf=2.0, neginf=-1.0) for z in shards()]
    for part in (0.0, 1e-3, 0.3, 0.9, 2.0):
        ours, expected = (
            projection.Brackets([part * float(z.clamp(0, 1).sum()) for z in kinds], torch.device("cpu"))
            for _ in range(2)
        )
        for number, (shift, bins) in enumerate(projection.ROUNDS):
            bases = expected.base * bins
            tables = torch.stack(
                [projection.histogram([z], base, shift, bins) for z, base in zip(kinds, bases, strict=True)]
            )
            expected.narrow(tables, shift)
            fields = (ours.budget, ours.base, ours.slope, ours.value, ours.lowest)
            projection_triton.narrow(tables, shift, *fields)
            if number == 0:
                assert torch.allclose(ours.lowest, expected.lowest, rtol=1e-14, atol=1e-14)
            assert torch.equal(ours.base, expected.base)
            assert torch.equal(ours.slope, expected.slope)
            assert torch.allclose(ours.value, expected.value, rtol=1e-14, atol=1e-14)
        assert torch.allclose(ours.roots(), expected.roots(), rtol=1e-12, atol=1e-14)


def projected_bits_are_those_of_the_torch_form() -> None:
    for z in shards():
        for threshold in (0.0, 0.1234567, float("nan")):
            expected, ours, v = z.nan_to_num(0.3), z.nan_to_num(0.3), torch.tensor(threshold, dtype=torch.float64)
            projection.subtract_and_clamp_([(expected, 12345678901)], v)
            projection_triton.subtract_and_clamp(ours, v, 12345678901)
            assert torch.equal(ours.nan_to_num(-1), expected.nan_to_num(-1)), threshold


def keys_are_counted_as_by_the_torch_form() -> None:
    radix_triton.PROGRAMS, radix_triton.CELLS = 5, 3 * 2048  # so that programs go round, and share tables
    g = torch.Generator().manual_seed(3)
    scores = torch.cat([torch.randn(12_000, generator=g), torch.full((3000,), 0.5)])
    pieces = [radix.Piece(0, 0, 9000), radix.Piece(2, 9000, 1), radix.Piece(1, 9001, 5999)]
    for dtype in (torch.float32, torch.float64):
        keys, _ = radix._torch_keys(scores.to(dtype), None)
        for groups, own in ((1, [radix.Piece(0, 0, 15_000)]), (3, pieces)):
            numbers = torch.cat([torch.full((p.numel,), p.group) for p in own]) if groups > 1 else None
            search = radix._Search(own, groups, single())
            base = torch.zeros(groups, dtype=torch.int64)
            for number, (shift, bins) in enumerate(radix.rounds(torch.iinfo(keys.dtype).bits, 11)):
                base = torch.full_like(base, -bins // 2) if number == 0 else base * bins
                expected = search._torch_table(keys, base, shift, bins)
                assert torch.equal(radix_triton.count(keys, numbers, base, shift, bins), expected), (dtype, shift)
                base = base + expected.argmax(1)


CHECKS: list[Callable[[], None]] = [
    words_are_those_of_the_torch_form,
    halves_of_a_key_are_signed_32_bit_numbers,
    masked_weights_are_those_of_the_torch_form,
    gradients_are_those_of_the_torch_form,
    a_weight_has_the_same_bits_in_every_slice,
    a_nan_probability_is_not_hidden,
    tables_are_those_of_the_torch_form,
    brackets_are_those_of_the_torch_form,
    projected_bits_are_those_of_the_torch_form,
    keys_are_counted_as_by_the_torch_form,
]


def main() -> None:
    relaxed_mask_triton.compile_all()
    projection_triton.compile_all()
    radix_triton.compile_all()
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
