"""How are images and labels mixed in pairs: Mixup and CutMix, as functions of (seed, step, part of the batch)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostmask.engine.data import PartBatch
from ghostmask.engine.drawing import drawing
from ghostmask.engine.hooks import Hook
from ghostmask.engine.recipe import AugmentConfig

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer


class Mixing(Hook):
    """torchvision's MixUp and CutMix on each part of a batch by itself: an image is mixed with the one before it in its
    part (the first with the last; the order of samples is a permutation already), all of a part with one share."""

    def __init__(self, config: AugmentConfig, num_classes: int, seed: int) -> None:
        self.config, self.num_classes, self.seed = config, num_classes, seed

    def on_part(self, trainer: Trainer, number: int, part: PartBatch) -> PartBatch:
        images, soft = self.mixed(part.images, part.labels, trainer.position.step, number)
        return part if soft is None else part._replace(images=images, soft=soft)

    def mixed(self, images: Tensor, labels: Tensor, step: int, number: int) -> tuple[Tensor, Tensor | None]:
        """Images (N, C, H, W) and targets (N, num_classes) of part `number` of a step; the images themselves and None
        where it is not mixed."""
        from torchvision.transforms import v2  # half a second

        c = self.config
        with drawing(f"{self.seed} mix {step} {number}"):
            mix, kind = torch.rand(2).tolist()
            if mix >= c.mix_fraction:
                return images, None
            use_cutmix = c.cutmix > 0 and (c.mixup == 0 or kind < 0.5)
            form: Any = v2.CutMix if use_cutmix else v2.MixUp
            mixed, soft = form(alpha=c.cutmix if use_cutmix else c.mixup, num_classes=self.num_classes)(images, labels)
        return mixed, soft
