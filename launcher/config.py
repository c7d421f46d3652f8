"""The configuration tree of a run: one frozen, typed tree whose branches are owned by the packages that use them."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.engine.config import (
    REFERENCE_BATCH,
    CheckpointConfig,
    FinetuneConfig,
    OptimConfig,
    TrainConfig,
    path_field,
    require_number,
)
from ghostmask.engine.errors import InputError
from ghostmask.engine.recipe import AugmentConfig, DistillConfig, EmaConfig
from ghostmask.launcher.values import as_text
from ghostmask.masks.settings import MaskSettings
from ghostmask.models.config import ModelConfig, TostConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    run: str = path_field("", changes=True)
    """The run's name (folder runs/NAME) or, with a slash in it, its folder; empty = the config file's name."""
    seed: int = 0
    """Seed of the initialisation, the order of samples, the augmentation and the mask noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskSettings = field(default_factory=MaskSettings)
    """Of the class that mask.method's file calls Settings."""
    tost: TostConfig = field(default_factory=TostConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require_number("seed", self.seed, 0, 2**63 - 1)

    @property
    def noises(self) -> int:
        """S: noise samples per step; 1 for methods without noise."""
        return int(getattr(self.mask, "noises", 1))

    @property
    def lr_scale(self) -> float:
        """What optim.lr and finetune.lr are multiplied by for the size of the batch (optim.scale_lr)."""
        ratio = self.data.batch_size / REFERENCE_BATCH
        return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.optim.scale_lr]

    def given(self, section: str) -> set[str]:
        """The settings of a section that are not at their default: someone set them and expects them to be read."""
        values = getattr(self, section)
        return {f.name for f in fields(values) if getattr(values, f.name) != default_of(f)}

    def not_read(self, section: str, name: str, chosen: str, alternative: str) -> InputError:
        """The error for a setting that a run with `chosen` would ignore."""
        value = as_text(getattr(getattr(self, section), name))
        return InputError(f"{section}.{name} = {value}: is not read with {chosen}; leave it out, or use {alternative}")


def default_of(setting: Field[Any]) -> Any:
    """The default of a dataclass field."""
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default
