"""Draws a final mask from the probabilities: m ~ Bernoulli(s), the paper's way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def bernoulli_masks(probabilities: Mapping[str, Tensor], seed: int, candidate: int) -> dict[str, Tensor]:
    """Boolean masks, each weight kept with its probability: a function of (seed, candidate, name), as on all ranks."""
    return {name: _draw(s, seed, candidate, name) for name, s in probabilities.items()}


def _draw(s: Tensor, seed: int, candidate: int, name: str) -> Tensor:
    digest = hashlib.blake2b(f"final mask {seed} {candidate} {name}".encode(), digest_size=16).digest()
    uniform = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(s.numel(), np.float32)
    return torch.from_numpy(uniform).view(s.shape).to(s.device) < s
