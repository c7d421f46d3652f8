"""The settings of what is done to batches, targets and weights beyond the plain recipe. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ghostmask.engine.config import path_field, require, require_number


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images on the device, in every phase, after the loader's crop and flip (data.augment).

    Mixup and CutMix: images of a part of the batch are mixed in pairs, and their labels alike."""

    mixup: float = 0.0
    """Mixup (Zhang et al. 2018): alpha of Beta(alpha, alpha), from which the first image's share is drawn; 0 = off."""
    cutmix: float = 0.0
    """CutMix (Yun et al. 2019): the same for the share of the area that is not cut out; 0 = off. With both, every part
    gets one of them, with equal probabilities."""
    mix_fraction: float = 1.0
    """Share of the parts of batches (train.replicas) that are mixed at all."""
    randaugment: int = 0
    """RandAugment (Cubuk et al. 2020): operations that every image goes through, such as 2; 0 = off."""
    magnitude: int = 9
    """Strength of RandAugment's operations, of 0 to 30."""

    def __post_init__(self) -> None:
        require_number("augment.mixup", self.mixup, 0, 1000)
        require_number("augment.cutmix", self.cutmix, 0, 1000)
        require_number("augment.mix_fraction", self.mix_fraction, 0, 1, above=True)
        require_number("augment.randaugment", self.randaugment, 0, 20)
        require_number("augment.magnitude", self.magnitude, 0, 30)

    @property
    def mixes(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights and of batch norm's statistics, in the phase that trains the network
    that is delivered (of lth: in every round). It is evaluated and exported in the place of the last weights."""

    decay: float = 0.0
    """Share of the average that stays at an update, such as 0.999; less in the first updates: at most
    (1 + updates) / (10 + updates). 0 = off."""

    def __post_init__(self) -> None:
        require_number("ema.decay", self.decay, 0, 0.999999)


@dataclass(frozen=True)
class DistillConfig:
    """Knowledge distillation (Hinton et al. 2015), in every phase: the loss becomes (1 - alpha) times the usual one,
    plus alpha temperature^2 KL(teacher || network), both softened by the temperature. It sees the same images."""

    path: str = path_field("")
    """The teacher: a finished run's folder, or a .safetensors or .pt file with a state dict; empty = none."""
    model: str = ""
    """The teacher's network, as model.name; empty = that of its run folder, or of a file: this run's."""
    alpha: float = 0.5
    """Share of the teacher in the loss, in (0, 1]."""
    temperature: float = 4.0
    """What both logits are divided by."""

    def __post_init__(self) -> None:
        require_number("distill.alpha", self.alpha, 0, 1, above=True)
        require_number("distill.temperature", self.temperature, 0, 1000, above=True)
        require(self.path != "" or self.model == "", "distill.model", self.model, "is read with distill.path only")
