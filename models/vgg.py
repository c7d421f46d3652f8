"""VGG-19 with batch norm for small images: configuration E, five max-pools, one linear classifier."""

from __future__ import annotations

from torch import Tensor, nn

from ghostmask.models.image_size import require_image
from ghostmask.models.initialisation import kaiming_normal

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""(channels, convolutions) between max-pools: configuration E of the VGG paper."""


class VGG(nn.Module):
    """Convolution, batch norm, ReLU, pools, global average: images (N, C, H, W) -> logits (N, num_classes)."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_in = channels
        for width, depth in STAGES:
            for _ in range(depth):
                layers += [nn.Conv2d(num_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU(inplace=True))
                num_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(num_in, num_classes, bias=False)
        kaiming_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        logits: Tensor = self.fc(self.features(images).mean(dim=(2, 3)))
        return logits


def vgg19(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """VGG-19: 17 prunable tensors, 20,024,000 prunable weights for 10 classes. Images of at least 32x32."""
    require_image("vgg19", image_shape, 32)
    return VGG(num_classes, image_shape[0])
