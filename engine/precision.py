"""The number format of a forward pass: float32, or bfloat16 by autocast over float32 parameters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context in which convolutions and products run in `precision` ("fp32" or "bf16")."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
