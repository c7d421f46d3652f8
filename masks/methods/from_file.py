"""file: any given mask, whoever made it, is read from mask.path and trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ghostmask.engine.config import path_field, require
from ghostmask.engine.data import DataPipeline
from ghostmask.masks.mask_file import read_masks
from ghostmask.masks.one_shot import OneShot
from ghostmask.masks.settings import MaskSettings


@dataclass(frozen=True)
class Settings(MaskSettings):
    """file: the density is the file's."""

    path: str = path_field("")
    """The mask: a mask file, the zeros of a trained network (a run folder, a .safetensors or .pt), or a dict of
    tensors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.path != "", "mask.path", self.path, "name the file for mask.method=file")


class FromFile(OneShot):
    """The mask of a mask file, of a checkpoint's zeros or of a dict of tensors; the density is the file's."""

    Settings = Settings
    paper = "none: the mask is the user's"
    aliases = ("mask", "path", "load", "given", "fixed")
    read: dict[str, Tensor]

    def prepare(self) -> None:
        self.read = read_masks(self.settings.path, self.net, self.weights)

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        return self.read
