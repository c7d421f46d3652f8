"""Conv-4 of the lottery-ticket papers: four convolutions and three linear layers, no batch norm, no biases."""

from __future__ import annotations

from torch import Tensor, nn

from ghostmask.models.image_size import require_image
from ghostmask.models.initialisation import kaiming_normal


class Conv4(nn.Module):
    """64, 64, pool, 128, 128, pool, then linear 256, 256, num_classes: images (N, C, H, W) -> logits (N, num_classes).

    The first linear layer has 128 (H / 4) (W / 4) inputs, so a network takes images of one size only.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.features = nn.Sequential(
            *_two_convolutions(channels, 64), nn.MaxPool2d(2), *_two_convolutions(64, 128), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Linear(128 * (height // 4) * (width // 4), 256, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(256, 256, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(256, num_classes, bias=False),
        )
        kaiming_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def conv4(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Conv-4 for images of at least 4x4: 7 prunable tensors, 2,425,024 weights for 32x32 images and 10 classes."""
    require_image("conv4", image_shape, 4)
    return Conv4(num_classes, image_shape)


def _two_convolutions(num_in: int, num_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(num_in, num_out, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
    ]
