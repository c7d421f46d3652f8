"""How does RandAugment run on the device in whole batches, as a function of (seed, step, part, place in the part)?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ghostmask.engine.data import PartBatch
from ghostmask.engine.drawing import drawing
from ghostmask.engine.hooks import Hook
from ghostmask.engine.recipe import AugmentConfig

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer

DRAWS = 16
"""Operations drawn for a part at a time: images that share one do so once, others share the next."""


class RandAugmenting(Hook):
    """torchvision's RandAugment. For each operation a part is cut into DRAWS groups anew, and a draw is made for
    each group: one image alone is augmented as by a draw of its own, in a fraction of the calls."""

    def __init__(self, config: AugmentConfig, mean: tuple[float, ...], std: tuple[float, ...], seed: int) -> None:
        """mean, std: of the images' normalisation, per channel, for pixels in [0, 1]."""
        self.config, self.seed = config, seed
        moments = torch.tensor([mean, std], dtype=torch.float64).mul(255)[:, :, None, None]
        self._mean, self._factor = moments[0].float(), moments[1].reciprocal().float()

    def on_part(self, trainer: Trainer, number: int, part: PartBatch) -> PartBatch:
        device = part.images.device
        self._mean, self._factor = self._mean.to(device), self._factor.to(device)  # in the first step, and then there
        pixels = (part.images / self._factor + self._mean).round().clamp(0, 255).to(torch.uint8)
        pixels = self.augmented(pixels, trainer.position.step, number)
        return part._replace(
            images=(pixels.float() - self._mean) * self._factor
        )  # data_pipelines.loading.normalise's arithmetic

    def augmented(self, pixels: Tensor, step: int, number: int) -> Tensor:
        """(N, 3, H, W) uint8, of part `number` of a step."""
        from torchvision.transforms import v2  # half a second

        one = v2.RandAugment(num_ops=1, magnitude=self.config.magnitude)
        with drawing(f"{self.seed} randaugment {step} {number}"):
            for _ in range(self.config.randaugment):
                order = torch.randperm(len(pixels))
                there, back = order.to(pixels.device), order.argsort().to(pixels.device)
                pixels = torch.cat([one(group) for group in pixels[there].chunk(DRAWS)])[back]
        return pixels
