"""The residual networks for small images: ResNet-20/32 with doubled widths, ResNet-18/50 without stem pooling.

Blocks and names are torchvision's (`layer1.0.conv1`, `layer2.0.downsample.0`, ...). Shortcuts are a 1x1 convolution and
batch norm; the classifier is linear without bias (a 1x1 convolution without bias in the ProbMask code).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ghostmask.models.image_size import require_image
from ghostmask.models.initialisation import kaiming_normal

Block = type[BasicBlock] | type[Bottleneck]


class CifarResNet(nn.Module):
    """3x3 stem, then stages of blocks; each stage but the first halves the image; global average, linear classifier.

    Images (N, channels, H, W) -> logits (N, num_classes). depths and widths: blocks and channels of each stage; stride:
    of the stem.
    """

    def __init__(
        self, block: Block, depths: Sequence[int], widths: Sequence[int], num_classes: int, channels: int = 3,
        stride: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.num_stages = len(depths)
        num_in = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            self.add_module(f"layer{stage}", _stage(block, depth, num_in, width, stride=1 if stage == 1 else 2))
            num_in = width * block.expansion
        self.fc = nn.Linear(num_in, num_classes, bias=False)
        kaiming_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.relu(self.bn1(self.conv1(images)))
        for stage in range(1, self.num_stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def resnet20(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-20 with widths 32/64/128: 22 prunable weight tensors."""
    return _three_stages("resnet20", 3, num_classes, image_shape)


def resnet32(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-32 with widths 32/64/128: 34 prunable tensors, 1,855,584 prunable weights for 10 classes."""
    return _three_stages("resnet32", 5, num_classes, image_shape)


def digits_resnet(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-8 with widths 32/64/128, for short runs on a CPU: 10 prunable tensors, 307,296 weights for 10 classes."""
    require_image("digits_resnet", image_shape, 4)
    return CifarResNet(BasicBlock, (1, 1, 1), (32, 64, 128), num_classes, image_shape[0])


def resnet8(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-8, widths 32/64/128, stem of stride 2, for short CIFAR runs on a CPU: 10 prunable tensors."""
    require_image("resnet8", image_shape, 8)
    return CifarResNet(BasicBlock, (1, 1, 1), (32, 64, 128), num_classes, image_shape[0], stride=2)


def resnet18(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-18 (widths 64..512) with a 3x3 stem and without max-pool."""
    require_image("resnet18_cifar", image_shape, 8)
    return CifarResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), num_classes, image_shape[0])


def resnet50(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-50 (bottlenecks, widths 64..512) with a 3x3 stem and without max-pool."""
    require_image("resnet50_cifar", image_shape, 8)
    return CifarResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), num_classes, image_shape[0])


def _three_stages(name: str, depth: int, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    require_image(name, image_shape, 4)
    return CifarResNet(BasicBlock, (depth, depth, depth), (32, 64, 128), num_classes, image_shape[0])


def _stage(block: Block, depth: int, num_in: int, width: int, stride: int) -> nn.Sequential:
    num_out = width * block.expansion
    shortcut = None
    if stride != 1 or num_in != num_out:
        shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride=stride, bias=False), nn.BatchNorm2d(num_out))
    rest = [block(num_out, width) for _ in range(depth - 1)]
    return nn.Sequential(block(num_in, width, stride, shortcut), *rest)
