"""The settings of the network. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ghostmask.engine.config import require, require_number
from ghostmask.engine.errors import unknown_name
from ghostmask.models.names import check_name


@dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    name: str = "resnet32"
    """One of `ghostmask show models`, the name of a classification network of torchvision, or a function of your own
    as package.module:function, with (num_classes, image_shape) or (num_classes)."""
    num_classes: int = 0
    """Classes of the last layer; 0 = as many as the dataset has."""
    zero_init_last: bool = False
    """The last batch norm of every residual block starts at weight 0, the block as identity (Goyal et al. 2017)."""
    blurpool: bool = False
    """BlurPool (Zhang 2019): a 3x3 binomial filter before every strided convolution of 16 input channels or more. The
    exported state dict is the plain network's, but whoever loads it must filter too: models/blurpool.py. Its
    operations are not among the FLOPs that are reported."""

    def __post_init__(self) -> None:
        check_name(self.name)
        require_number("model.num_classes", self.num_classes, 0)


ACTIVATIONS = ("pswish", "swish", "mish")


@dataclass(frozen=True)
class TostConfig:
    """ToST: tweaks that train any given mask better, each on its own. `tost=all` turns all four on with the paper's
    values, `tost=none` puts every setting to its default. Their schedules run over the main phase; fine-tuning trains
    the plain network."""

    ghost_skip: bool = False
    """Extra skips (1x1 convolution, batch norm) around the 3x3 convolutions, faded out and then removed."""
    ghost_skip_fraction: float = 0.3
    """ghost_skip: fraction of the main phase over which their factor alpha falls from 1 to 0."""
    ghost_swish: bool = False
    """A soft activation in place of every ReLU at first; the finished network has ReLUs."""
    activation: str = "pswish"
    """ghost_swish: pswish (x sigmoid(beta x), beta growing), or fixed until the ReLU: swish (beta = 1), mish."""
    swish_fraction: float = 0.5
    """ghost_swish: fraction of the main phase after which the activation is ReLU."""
    swish_beta_end: float = 100.0
    """ghost_swish: beta of pswish just before it is ReLU; it grows geometrically from 1."""
    label_smoothing: float = 0.0
    """alpha in y (1 - alpha) + alpha / K of the training loss (never of the evaluation loss); 0.1 in the paper."""
    lrsi: bool = False
    """Layer-wise re-scaled initialisation: one learned factor per parameter tensor, before the main phase."""
    lrsi_steps: int = 180
    """lrsi: updates of the factors."""
    lrsi_lr: float = 1e-2
    """lrsi: learning rate of Adam on the factors."""
    lrsi_eta: float = 0.1
    """lrsi: size of the look-ahead SGD step after which the loss is minimised."""
    lrsi_gamma: float = 1.0
    """lrsi: above this norm of the gradient, the norm is minimised instead."""
    lrsi_normalize: bool = True
    """lrsi: the look-ahead step follows g / |g| instead of g, as the authors run it."""
    log_activation_sparsity: bool = False
    """Log, once per epoch, the share of exact zeros after each activation on one evaluation batch per rank."""

    def __post_init__(self) -> None:
        require_number("tost.ghost_skip_fraction", self.ghost_skip_fraction, 0, 1, above=True)
        require_number("tost.swish_fraction", self.swish_fraction, 0, 1, above=True)
        require_number("tost.swish_beta_end", self.swish_beta_end, 1, 1e6)
        require_number("tost.label_smoothing", self.label_smoothing, 0, 0.9999)
        require_number("tost.lrsi_steps", self.lrsi_steps, 1, 1e6)
        require_number("tost.lrsi_lr", self.lrsi_lr, 0, above=True)
        require_number("tost.lrsi_eta", self.lrsi_eta, 0, above=True)
        require_number("tost.lrsi_gamma", self.lrsi_gamma, 0)
        if self.activation not in ACTIVATIONS:
            raise unknown_name("tost.activation", self.activation, ACTIVATIONS)
        require(
            self.activation == "pswish" or self.swish_fraction < 1,
            "tost.swish_fraction", self.swish_fraction,
            f"tost.activation={self.activation} is not ReLU at its end; give less than 1, so that ReLUs are trained",
        )  # fmt: skip


TOST_PRESETS: dict[str, dict[str, bool | float]] = {
    "all": {"ghost_skip": True, "ghost_swish": True, "label_smoothing": 0.1, "lrsi": True},
    "none": {},
}
"""What `tost=all` adds to the section; `tost=none` empties it, so that every setting has its default."""
