"""The configuration tree of a run: one frozen, typed tree whose branches are owned by the packages that use them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.engine.config import (
    CheckpointConfig,
    FinetuneConfig,
    OptimConfig,
    TrainConfig,
    may_change,
    require,
    require_number,
)
from ghostmask.masks.config import MaskConfig
from ghostmask.models.config import ModelConfig, TostConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    run: str = may_change("")
    """The run's name (folder runs/NAME) or, with a slash in it, its folder; empty = the config file's name."""
    seed: int = 0
    """Seed of the initialisation, the order of samples, the augmentation and the mask noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    tost: TostConfig = field(default_factory=TostConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require_number("seed", self.seed, 0, 2**63 - 1)
        require(
            self.data.batch_size % self.train.accumulation == 0,
            "data.batch_size", self.data.batch_size, f"give a multiple of train.accumulation={self.train.accumulation}",
        )  # fmt: skip
