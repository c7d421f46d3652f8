"""The residual networks for ImageNet: torchvision's own, with its names, shapes and initialisation."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet

from ghostmask.engine.errors import bad_value
from ghostmask.models.image_size import require_image

SMALLEST_IMAGE = 32
"""The network halves an image five times."""


def resnet18(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's ResNet-18."""
    _require_colour("resnet18", image_shape)
    net: nn.Module = resnet.resnet18(weights=None, num_classes=num_classes)
    return net


def resnet50(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """torchvision's ResNet-50: 54 prunable tensors, 25,502,912 prunable weights for 1000 classes."""
    _require_colour("resnet50", image_shape)
    net: nn.Module = resnet.resnet50(weights=None, num_classes=num_classes)
    return net


def _require_colour(name: str, image_shape: tuple[int, int, int]) -> None:
    require_image(name, image_shape, SMALLEST_IMAGE)
    if image_shape[0] != 3:
        raise bad_value("model.name", name, f"needs images of 3 channels, the dataset has {image_shape[0]}")
