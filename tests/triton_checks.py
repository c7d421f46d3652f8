"""Do the Triton kernels compute what the torch forms compute? Run with TRITON_INTERPRET=1: no GPU is needed.

Prints {check: "" or what is wrong} as JSON; tests/test_masks_kernels_triton.py runs it.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostmask.masks.kernels import (
    projection,
    projection_bracket,
    projection_passes,
    projection_triton,
    relaxed_mask,
    relaxed_mask_triton,
)
from ghostmask.masks.kernels.noise import NoiseKey, random_words
from ghostmask.masks.kernels.relaxed_mask import EPS, relaxed_bucket, relaxed_bucket_backward

KEY, NUMBER = NoiseKey(3, 1, 4, 1).tensor(), 7
SHAPES = [(5, 3, 3, 3), (20, 70, 2, 2), (9000,), (33, 4, 1, 1), (1,)]


def no_kernels(place: Tensor | torch.device, module: str) -> None:
    return None


relaxed_mask.kernels_for = projection_passes.kernels_for = no_kernels
projection_bracket.kernels_on = no_kernels  # the forms in torch are the reference


@triton.jit
def store_words(key, number, out):
    block = tl.arange(0, 4)[:, None]
    words = relaxed_mask_triton._words(key, number, block)
    for k in tl.static_range(4):
        tl.store(out + block * 1024 + k * 256 + tl.arange(0, 256)[None, :], words[k].to(tl.int64))


def words_are_those_of_the_torch_form() -> None:
    out = torch.empty(4096, dtype=torch.int64)
    store_words[(1,)](KEY, NUMBER, out)
    assert torch.equal(out & 0xFFFFFFFF, random_words(KEY, NUMBER, 0, 4096))


def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(weights, probabilities from 0 to 1, gradients), in both memory orders."""
    g = torch.Generator().manual_seed(1)
    weights, grads = ([torch.randn(s, generator=g) for s in SHAPES] for _ in range(2))
    probabilities = [(torch.rand(s, generator=g) * 1.4 - 0.2).clamp(0, 1) for s in SHAPES]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    grads[0] = grads[0].to(memory_format=torch.channels_last)
    return weights, probabilities, grads


def close(ours: list[Tensor], theirs: list[Tensor], allowed: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype
        assert ((a.double() - b.double()).abs() <= allowed * (b.double().abs() + 1)).all()


def masked_weights_are_those_of_the_torch_form() -> None:
    weights, probabilities, _ = tensors()
    for tau, dtype, last in ((1.0, torch.float32, False), (0.1, torch.float32, True), (0.5, torch.bfloat16, True)):
        temperature = torch.tensor(tau)
        expected = relaxed_bucket(weights, probabilities, KEY, temperature, NUMBER, dtype, last)
        outs = [torch.full_like(e, float("nan")) for e in expected]
        relaxed_mask_triton.forward(weights, probabilities, outs, KEY, temperature, NUMBER, EPS)
        # The interpreter cuts bfloat16 off where a GPU rounds.
        close(outs, expected, 1e-6 if dtype == torch.float32 else 2**-7)


def gradients_are_those_of_the_torch_form() -> None:
    weights, probabilities, grads = tensors()
    for tau, dtype in ((1.0, torch.float32), (0.2, torch.bfloat16)):
        temperature, incoming = torch.tensor(tau), [g.to(dtype) for g in grads]
        expected_w, expected_s = relaxed_bucket_backward(incoming, weights, probabilities, KEY, temperature, NUMBER)
        grads_w, grads_s = ([torch.full_like(e, float("nan")) for e in part] for part in (expected_w, expected_s))
        relaxed_mask_triton.backward(
            incoming, weights, probabilities, grads_w, grads_s, KEY, temperature, NUMBER, EPS
        )  # fmt: skip
        close(grads_w, expected_w, 1e-6)
        close(grads_s, expected_s, 3e-6)


def a_table_is_made_once_and_anew_for_another_order_in_memory() -> None:
    memory = torch.rand(2, 5 * 4 * 3 * 3)
    w, s = memory[0].view(5, 4, 3, 3), memory[1].view(5, 4, 3, 3)
    table = relaxed_mask_triton._table([w], [s])[0]
    assert relaxed_mask_triton._table([w], [s])[0] is table
    turned = memory[1].view(5, 3, 3, 4).permute(0, 3, 1, 2)
    assert relaxed_mask_triton._table([w], [turned])[0].tolist() == [[*table[0].tolist()[:6], 4, 9]]
    for tensor in [torch.empty(3) for _ in range(relaxed_mask_triton.TABLES + 1)]:
        relaxed_mask_triton._table([tensor], [tensor])
    assert len(relaxed_mask_triton._tables) == relaxed_mask_triton.TABLES


def a_nan_probability_is_not_hidden() -> None:
    w, s = torch.ones(3), torch.tensor([0.5, float("nan"), 0.0])
    out = torch.empty(3)
    relaxed_mask_triton.forward([w], [s], [out], KEY, torch.tensor(0.5), 0, EPS)
    assert out.isnan().tolist() == [False, True, False]


def shards() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    odd = torch.tensor([0.0, -0.0, 1.0, 1e-42, 2.0**24, 1e30, float("nan"), float("inf"), float("-inf"), 1 + 2**-23])
    return [torch.randn(9001, generator=g), torch.full((5000,), 0.7), odd, torch.rand(4096, generator=g) * 2]


def tables_are_those_of_the_torch_form() -> None:
    projection_triton.PROGRAMS = 3  # so that a program goes round more than once
    for z in shards():
        for base, shift, bins in ((0, 20, 1216), (1016 * 1024 + 100, 10, 1024), (0x3F333333 - 200, 0, 1024)):
            first = torch.tensor(base)
            expected = projection_passes.histogram(z, first, shift, bins)
            assert torch.equal(projection_triton.histogram(z, first, shift, bins), expected), (base, shift)


def brackets_are_those_of_the_torch_form() -> None:
    kinds = [z.nan_to_num(0.5, posinf=2.0, neginf=-1.0) for z in shards()]
    for part in (0.0, 1e-3, 0.3, 0.9, 2.0):
        ours, expected = (
            projection_bracket.Brackets.around([part * float(z.clamp(0, 1).sum()) for z in kinds], torch.device("cpu"))
            for _ in range(2)
        )
        for number, (shift, bins) in enumerate(projection.ROUNDS):
            bases = expected.base * bins
            tables = torch.stack(
                [projection_passes.histogram(z, base, shift, bins) for z, base in zip(kinds, bases, strict=True)]
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
            projection_passes.subtract_and_clamp_(expected, v, 12345678901)
            projection_triton.subtract_and_clamp(ours, v, 12345678901)
            assert torch.equal(ours.nan_to_num(-1), expected.nan_to_num(-1)), threshold


CHECKS: list[Callable[[], None]] = [
    words_are_those_of_the_torch_form,
    masked_weights_are_those_of_the_torch_form,
    gradients_are_those_of_the_torch_form,
    a_table_is_made_once_and_anew_for_another_order_in_memory,
    a_nan_probability_is_not_hidden,
    tables_are_those_of_the_torch_form,
    brackets_are_those_of_the_torch_form,
    projected_bits_are_those_of_the_torch_form,
]


def main() -> None:
    relaxed_mask_triton.compile_all()
    projection_triton.compile_all()
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
