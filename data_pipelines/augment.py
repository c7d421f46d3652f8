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
    n, height, width, _ = images.shape
    down, right, flip = drawn
    if augmentation.pad:
        p = augmentation.pad
        rows = (down[:, None] + torch.arange(height, device=images.device))[:, :, None]
        columns = torch.arange(width, device=images.device).expand(n, width)
        # Mirrored images read their columns from the right: one gather does both.
        columns = (right[:, None] + torch.where(flip[:, None] > 0, width - 1 - columns, columns))[:, None, :]
        sample = torch.arange(n, device=images.device)[:, None, None]
        return pad_with_zeros(images, (0, 0, p, p, p, p))[sample, rows, columns]
    if augmentation.flip:
        return torch.where(flip[:, None, None, None] > 0, images.flip(2), images)
    return images


@dataclass(frozen=True)
class Normalisation:
    """(pixel / 255 - mean) / std per channel, as one subtraction and one multiplication."""

    mean: Tensor
    """(1, 3, 1, 1), in gray levels 0..255."""
    factor: Tensor
    """(1, 3, 1, 1): 1 / (255 std)."""

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Normalisation:
        """From mean and std of pixels in [0, 1]."""
        channels = torch.tensor([mean, std], dtype=torch.float64).mul(255).view(2, 1, 3, 1, 1)
        return cls(channels[0].float().to(device), channels[1].reciprocal().float().to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, 3, H, W) float32 in channels_last order; a new tensor."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        return pixels.sub_(self.mean).mul_(self.factor)
