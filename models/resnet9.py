"""ResNet-9, the network of fast CIFAR-10 training (Page 2018; DAWNBench): few wide layers that fill a GPU."""

from __future__ import annotations

from torch import Tensor, nn

from ghostmask.models.image_size import require_image
from ghostmask.models.initialisation import kaiming_normal

LOGIT_SCALE = 0.125
"""Page's factor on the logits, without which this network's are too large at its high rates."""


class ResNet9(nn.Module):
    """Images (N, channels, H, W), H and W of at least 8 -> logits (N, num_classes)."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.stem = _block(channels, 64)
        self.layer1 = _block(64, 128, pool=True)
        self.residual1 = nn.Sequential(_block(128, 128), _block(128, 128))
        self.layer2 = _block(128, 256, pool=True)
        self.layer3 = _block(256, 512, pool=True)
        self.residual3 = nn.Sequential(_block(512, 512), _block(512, 512))
        self.fc = nn.Linear(512, num_classes, bias=False)
        kaiming_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.layer1(self.stem(images))
        x = self.layer3(self.layer2(x + self.residual1(x)))
        x = (x + self.residual3(x)).amax(dim=(2, 3))
        logits: Tensor = self.fc(x) * LOGIT_SCALE
        return logits


def resnet9(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-9 (widths 64..512) of fast CIFAR training: 9 prunable tensors, 6,568,640 weights for 10 classes."""
    require_image("resnet9", image_shape, 8)
    return ResNet9(num_classes, image_shape[0])


def _block(num_in: int, num_out: int, *, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)
