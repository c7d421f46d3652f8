"""What is the relaxed mask in torch operations: the form for every device and type, and the kernels' reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ghostmask.masks.kernels.memory_order import filled, in_memory, laid_out
from ghostmask.masks.kernels.noise import random_words

CHUNK = 1 << 20
"""Weights per step (a multiple of 1024): bounds the temporary memory to about 100 MB."""


def relaxed_mask(
    probability: Tensor, key: Tensor, temperature: Tensor, number: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """(m, 1 - m) of a vector of limited probabilities, the weights first, first + 1, ... of tensor `number`.

    In the probabilities' type. 1 - m is computed as a sigmoid of its own: small values keep their digits.
    """
    words = random_words(key.to(probability.device), number, first, len(probability))
    # u / (1 - u) from the word and its complement: neither can be 0, and neither end loses digits.
    odds = (words.to(probability.dtype) + 0.5) * probability
    odds = odds / (((0xFFFFFFFF - words).to(probability.dtype) + 0.5) * (1 - probability))
    x = odds.log() / temperature
    return x.sigmoid(), (-x).sigmoid()


def forward(weights: list[Tensor], probabilities: list[Tensor], outs: list[Tensor], key: Tensor, temperature: Tensor,
            number: int, eps: float) -> None:  # fmt: skip
    """out = w m of each tensor, the first of which is the `number`-th; out of any float type and memory order."""
    with filled(outs, weights) as targets:
        for i, (w, s, out) in enumerate(zip(weights, probabilities, targets, strict=True), number):
            vectors = [in_memory(laid_out(t, out)) for t in (w, s, out)]
            for start, (w_, s_, out_) in _chunks(vectors):
                m, _ = relaxed_mask(s_.clamp(eps, 1 - eps), key, temperature, i, start)
                torch.mul(w_, m, out=out_)


def backward(grads: list[Tensor], weights: list[Tensor], probabilities: list[Tensor], grads_w: list[Tensor],
             grads_s: list[Tensor], key: Tensor, temperature: Tensor, number: int, eps: float) -> None:  # fmt: skip
    """grad_w = g m and grad_s = g w m (1 - m) / (tau s (1 - s)) of each tensor; grad_w in the order of its weight."""
    with filled(grads_s, grads_w) as slopes:
        for i, tensors in enumerate(zip(grads, weights, probabilities, grads_w, slopes, strict=True), number):
            vectors = [in_memory(laid_out(t, tensors[3])) for t in tensors]
            for start, (g, w, s, grad_w, slope) in _chunks(vectors):
                limited = s.clamp(eps, 1 - eps)
                m, rest = relaxed_mask(limited, key, temperature, i, start)
                torch.mul(g, m, out=grad_w)
                torch.mul(grad_w * w, rest / (temperature * limited * (1 - limited)), out=slope)


def _chunks(vectors: list[Tensor]) -> list[tuple[int, tuple[Tensor, ...]]]:
    parts = zip(*(torch.split(v, CHUNK) for v in vectors), strict=True)
    return [(number * CHUNK, part) for number, part in enumerate(parts)]
