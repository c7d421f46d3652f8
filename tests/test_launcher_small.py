"""Does a network without its dead channels compute what it computed with them?"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from granular import masks_of, scores_of, units
from PIL import Image
from sparse_exports import DIGITS, export, network
from torch import Tensor, nn

from ghostmask.launcher.exporting import onnx_file
from ghostmask.launcher.exporting.convert import write_format
from ghostmask.launcher.exporting.exported import Options, read_exported
from ghostmask.launcher.exporting.small import PROGRAM, SCRIPT, Small, shrink
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.scoring.topk import Budget


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@torch.no_grad()
def difference(net: nn.Module, small: Small, shape: tuple[int, int, int]) -> float:
    """The largest, of random images, relative to the largest output."""
    images = 2 * torch.randn(4, *shape)
    expected = net(images)
    return float((small.graph(images) - expected).abs().max() / expected.abs().max())


def few_weights(net: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """Random masks, which leave channels without inputs, without outputs, and with only negative weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in prunable_weights(net).values():
            weight.mul_(torch.rand(weight.shape, generator=generator) < density)
    return net


@pytest.mark.parametrize(
    ("name", "shape", "density", "options"),
    [
        ("digits_resnet", DIGITS, 0.01, {}), ("digits_resnet", DIGITS, 0.003, {}), ("resnet20", (3, 16, 16), 0.02, {}),
        ("conv4", (3, 16, 16), 0.01, {}), ("resnet9", (3, 16, 16), 0.005, {}),
        ("resnet18_cifar", (3, 16, 16), 0.005, {"blurpool": True}), ("mobilenet_v3_small", (3, 32, 32), 0.3, {}),
        ("densenet121", (3, 32, 32), 0.03, {}),
    ],
)  # fmt: skip
def test_outputs_stay_and_channels_go(
    name: str, shape: tuple[int, int, int], density: float, options: dict[str, Any]
) -> None:
    net = few_weights(network(name, 10, shape, 1.0, **options), density)
    small = shrink(net, shape)
    assert small.removed
    assert parameters(small.graph) < parameters(net)
    assert difference(net, small, shape) < 1e-5


class Padded(nn.Module):
    """conv1 gives constants; conv2 reads them beside zeros around the image, conv3 does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).relu()
        return (self.conv2(x) + self.conv3(x)).mean((2, 3))


def test_of_constants_beside_padding_one_stays_for_all() -> None:
    torch.manual_seed(0)
    net = Padded().eval()
    with torch.no_grad():
        net.conv1.weight[:6] = 0
        net.conv1.bias[:6] = torch.tensor([1.0, 0.7, -1.0, 0.5, 0.4, 0.3])
        net.conv2.weight[:, 1] = 0  # channel 1 is a constant that only the 1x1 convolution reads
        net.conv2.weight[:, 3], net.conv3.weight[:, 3] = 0, 0  # and 3 is read by nobody
    small = shrink(net, (3, 8, 8))
    assert small.removed["conv1"] == (8, 3), "of channels 0 to 5 the largest constant; 2 is cut off by ReLU"
    assert difference(net, small, (3, 8, 8)) < 1e-5


def test_a_channel_whose_weights_and_bias_are_negative_behind_relu_is_dead() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 3), nn.Flatten()
    ).eval()
    middle, last = net[2], net[4]
    assert isinstance(middle, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        middle.weight[0] = -middle.weight[0].abs()
        assert middle.bias is not None
        middle.bias[0] = 0.0
    small = shrink(net, (3, 8, 8))
    assert small.removed == {"2": (5, 4)}
    assert difference(net, small, (3, 8, 8)) < 1e-5


def test_channels_that_are_added_are_kept_together() -> None:
    net = network("digits_resnet", 10, DIGITS, 1.0)
    with torch.no_grad():
        for name in ("layer2.0.conv2", "layer2.0.downsample.0"):
            net.get_parameter(f"{name}.weight")[7] = 0
        for name in ("layer2.0.bn2", "layer2.0.downsample.1"):
            for tensor in ("weight", "bias"):
                net.get_parameter(f"{name}.{tensor}")[7] = 0
        net.get_parameter("layer2.0.conv2.weight")[9] = 0  # only one of two that are added
    small = shrink(net, DIGITS)
    assert small.removed == {"layer2.0.conv2": (64, 63), "layer2.0.downsample.0": (64, 63)}
    assert difference(net, small, DIGITS) < 1e-5


class Tied(nn.Module):
    """A convolution that is called twice, and two that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        x = self.two(self.twice(self.twice(self.one(x)).relu()).relu()).relu()
        return x.mean((2, 3))


def test_layers_that_share_weights_are_not_changed_for_each_other() -> None:
    torch.manual_seed(0)
    net = Tied().eval()
    with torch.no_grad():
        net.stem.weight[:2] = 0
        net.stem.bias[:] = torch.tensor([0.5, -1.0, 0.1, 0.2])
        net.one.weight[1, 2:] = 0  # a constant of `one`, whose input is constant there, but not of `two`
    small = shrink(net, (3, 8, 8))
    assert small.removed["stem"] == (4, 2)
    assert difference(net, small, (3, 8, 8)) < 1e-5


def test_a_removed_output_channel_takes_along_what_only_it_reads() -> None:
    net = network("digits_resnet", 10, DIGITS, 1.0)
    with torch.no_grad():
        net.get_parameter("layer1.0.conv2.weight")[:, 5] = 0
    assert shrink(net, DIGITS).removed == {"layer1.0.conv1": (32, 31)}


@pytest.mark.parametrize("name", ["resnet20", "bottleneck"])
def test_channels_that_a_granularity_prunes_are_gone_to_the_last_weight(name: str) -> None:
    made, weights, net, shape = units(name, granularity="channel", density=0.4)
    masks = masks_of(made, scores_of(weights), Budget(0.4, units=made))
    with torch.no_grad():
        for name_, mask in masks.items():
            weights[name_].mul_(mask)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.uniform_(-0.3, 0.2)  # of removed channels too: nothing reads them
    small = shrink(net.eval(), shape)
    left = sum(w.numel() for n, w in small.graph.named_parameters() if n.endswith("weight"))
    assert left == sum(int(mask.sum()) for mask in masks.values())
    assert difference(net, small, shape) < 1e-5


def photographs(shared_folder: Path, count: int) -> Tensor:
    """(count, 3, 224, 224), normalised."""
    paths = sorted((shared_folder / "data" / "imagenette224" / "val").rglob("*.JPEG"))[:: 500 // count][:count]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None]


def test_all_forms_give_the_same_on_photographs(shared_folder: Path, tmp_path: Path) -> None:
    images, shape = photographs(shared_folder, 2), (3, 224, 224)
    net = few_weights(network("resnet18", 10, shape, 1.0), 0.003)
    with torch.no_grad():
        for module in net.modules():  # statistics of these images, so that layers neither die nor explode
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        net.train()(images)
        expected = net.eval()(images)
    export(tmp_path, net, "resnet18", shape)
    exported = read_exported(tmp_path)
    write_format(exported, tmp_path / "small", "small", Options())
    results = {
        "program": torch.export.load(tmp_path / "small" / PROGRAM).module()(images),
        "script": torch.jit.load(tmp_path / "small" / SCRIPT)(images),  # type: ignore[no-untyped-call]
    }
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        write_format(exported, tmp_path / "onnx", "onnx", Options())
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / onnx_file.FILE, providers=["CPUExecutionProvider"])
        results["onnx"] = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    for name, logits in results.items():
        assert float((logits - expected).abs().max()) < 1e-5 * float(expected.abs().max()), name
    assert "dead channels" in (tmp_path / "small" / "README.md").read_text()
    assert parameters(shrink(net, shape).graph) < parameters(net)
