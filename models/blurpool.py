"""What is BlurPool: the image is smoothed before every strided convolution, so that a shift of it changes less."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.errors import bad_value

FEWEST_CHANNELS = 16
"""Convolutions of fewer input channels, the stem's, are left alone, as in FFCV's ImageNet recipe."""


def blurpool(net: nn.Module) -> nn.Module:
    """`net` itself, whose strided convolutions of FEWEST_CHANNELS or more from now on filter their input by
    [1 2 1]^T [1 2 1] / 16 (zeros around it), channel by channel (Zhang 2019). Names and state dict stay as they are.

    Raises InputError where there is no such convolution.
    """
    line = torch.tensor([1.0, 2.0, 1.0])
    found = [
        m for m in net.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1 and m.in_channels >= FEWEST_CHANNELS
    ]
    if not found:
        raise bad_value(
            "model.blurpool", True, "this network has no strided convolutions to blur before; set it to false"
        )
    for conv in found:
        # A buffer, to be where the network is; not persistent, so that no file holds it.
        conv.register_buffer("blur", torch.outer(line, line)[None, None] / 16, persistent=False)
        conv.register_forward_pre_hook(_blurred)
    return net


def blurred(images: Tensor) -> Tensor:
    """The filter by itself, for a graph without hooks: needs nothing of this file."""
    line = torch.tensor([1.0, 2.0, 1.0], dtype=images.dtype, device=images.device)
    kernel = (torch.outer(line, line) / 16).expand(images.shape[1], 1, 3, 3)
    return functional.conv2d(images, kernel, padding=1, groups=images.shape[1])


def _blurred(conv: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A hook: whoever else looks at the convolution's input, later, sees the filtered one."""
    (images,) = inputs
    channels = images.shape[1]
    kernel = conv.get_buffer("blur").expand(channels, 1, 3, 3)
    return (functional.conv2d(images, kernel, padding=1, groups=channels),)
