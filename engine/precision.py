"""The number format of a forward pass: float32, with or without TF32's products, or bfloat16 by autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context in which convolutions and products run in `precision` ("fp32", "tf32" or "bf16")."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def set_float32_precision(precision: str) -> None:
    """Let this process's float32 products and convolutions on CUDA be exact ("fp32") or rounded to TF32 ("tf32")."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
