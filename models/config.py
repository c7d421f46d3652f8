"""The settings of the network. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import require_number
from engine.errors import unknown_name
from models.registry import MODELS


@dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    name: str = "resnet32"
    """One of `ghostmask show models`."""
    num_classes: int = 0
    """Classes of the last layer; 0 = as many as the dataset has."""

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise unknown_name("model.name", self.name, MODELS)
        require_number("model.num_classes", self.num_classes, 0)


@dataclass(frozen=True)
class TostConfig:
    """ToST: tweaks that train any given mask better, each on its own."""

    label_smoothing: float = 0.0
    """alpha in y (1 - alpha) + alpha / K of the training loss (never of the evaluation loss); 0.1 in the paper."""

    def __post_init__(self) -> None:
        require_number("tost.label_smoothing", self.label_smoothing, 0, 0.9999)
