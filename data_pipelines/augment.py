"""How a batch of uint8 images becomes the network's input on the device: shift, flip, normalise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad as pad_with_zeros

from data_pipelines.order import Words
from data_pipelines.source import Augmentation


def draws(words: Words, augmentation: Augmentation) -> Tensor:
    """(3, n) int64 on the CPU: rows of shift down and right in [0, 2 pad] and of flips in {0, 1}, one column per word.

    Bit fields of the word; the shift's bias against uniform is below 2^-16 x (2 pad + 1).
    """
    places = np.uint64(2 * augmentation.pad + 1)
    down = ((words >> np.uint64(16)) & np.uint64(0xFFFF)) * places >> np.uint64(16)
    right = ((words >> np.uint64(32)) & np.uint64(0xFFFF)) * places >> np.uint64(16)
    flip = (words & np.uint64(1)) * np.uint64(augmentation.flip)
    return torch.from_numpy(np.stack([down, right, flip]).astype(np.int64))


def shift_and_flip(images: Tensor, drawn: Tensor, augmentation: Augmentation) -> Tensor:
    """(n, H, W, 3) uint8: crops of the zero-padded images at (drawn[0], drawn[1]), mirrored where drawn[2]."""
    down, right, flip = drawn
    if augmentation.pad:
        images = _shift(images, down, right, augmentation.pad)
    if augmentation.flip:
        images = torch.where(flip[:, None, None, None] > 0, images.flip(2), images)
    return images


def _shift(images: Tensor, down: Tensor, right: Tensor, pad: int) -> Tensor:
    n, height, width, channels = images.shape
    padded = pad_with_zeros(images, (0, 0, pad, pad, pad, pad)).contiguous()
    sample, row, column, _ = padded.stride()
    # Every possible crop as a view whose last axis is one whole line: a gather then copies lines, not pixels.
    places = 2 * pad + 1
    crops = padded.as_strided((n, places, places, height, width * channels), (sample, row, column, row, 1))
    return crops[torch.arange(n, device=images.device), down, right].view(n, height, width, channels)


@dataclass(frozen=True)
class Normalisation:
    """(pixel / 255 - mean) / std per channel, as one subtraction and one multiplication."""

    mean: Tensor
    """(width * 3,) in gray levels 0..255: one line, since an inner axis of 3 is six times slower on a CPU."""
    factor: Tensor
    """(width * 3,) 1 / (255 std)."""

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device) -> Normalisation:
        """From mean and std of pixels in [0, 1], for images of this width."""
        moments = torch.tensor([mean, std], dtype=torch.float64).mul(255).repeat(1, width)
        return cls(moments[0].float().to(device), moments[1].reciprocal().float().to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """(n, H, width, 3) uint8 -> (n, 3, H, width) float32 in channels_last order; a new tensor."""
        pixels = images.to(torch.float32).view(*images.shape[:2], -1).sub_(self.mean).mul_(self.factor)
        return pixels.view(images.shape).permute(0, 3, 1, 2)
