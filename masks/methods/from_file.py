"""file: any given mask, whoever made it, is read from mask.path and trained from scratch."""

from __future__ import annotations

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.masks.mask_file import read_masks
from ghostmask.masks.one_shot import OneShot


class FromFile(OneShot):
    """The mask of a mask file, of a checkpoint's zeros or of a dict of tensors; the density is the file's."""

    read: dict[str, Tensor]
    protects = False

    def prepare(self) -> None:
        self.read = read_masks(self.config.path, self.net, self.weights)

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        return self.read
