"""Do BlurPool and zero-initialised blocks change a network as their papers say, and its names and files not at all?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from ghostmask.engine.errors import InputError
from ghostmask.launcher.export import write_export
from ghostmask.models.blurpool import blurpool
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

SHAPE = (3, 32, 32)


def built(name: str, **options: Any) -> nn.Module:
    return build_model(ModelConfig(name, **options), 10, SHAPE, seed=0)


def filtered_by_hand(images: Tensor) -> Tensor:
    """[1 2 1]^T [1 2 1] / 16 with zeros around, by shifting."""
    padded = functional.pad(images, (1, 1, 1, 1))
    height, width = images.shape[2:]
    return sum(
        padded[:, :, i : i + height, j : j + width] * ((2 - abs(i - 1)) * (2 - abs(j - 1)) / 16)
        for i in range(3)
        for j in range(3)
    )  # type: ignore[return-value]


def test_strided_convolutions_filter_their_input_and_no_others_do() -> None:
    plain, blurred = built("resnet18"), built("resnet18", blurpool=True)
    strided = []
    for name, conv in blurred.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        before = plain.get_submodule(name).double()
        images = torch.randn(2, conv.in_channels, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        is_strided = conv.stride == (2, 2) and conv.in_channels >= 16
        wanted = before(filtered_by_hand(images) if is_strided else images)
        torch.testing.assert_close(conv.double()(images), wanted, atol=1e-10, rtol=0)
        strided += [name] if is_strided else []
    assert strided == [f"layer{i}.0.{c}" for i in (2, 3, 4) for c in ("conv1", "downsample.0")]


def test_an_exported_blurred_network_is_a_plain_file_that_gives_the_same_logits_with_the_filter(tmp_path: Path) -> None:
    net = built("resnet18", blurpool=True).eval()
    write_export(tmp_path, net, {}, accuracy=None, image_shape=SHAPE, config={})
    tensors = load_file(tmp_path / "model.safetensors")
    theirs = resnet18(num_classes=10)
    theirs.load_state_dict(tensors, strict=True)
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = net(images)
        assert not torch.allclose(theirs.eval()(images), wanted, atol=1e-3)
        torch.testing.assert_close(blurpool(theirs)(images), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(copy.deepcopy(net)(images), wanted, atol=1e-5, rtol=0)


def test_zeroed_blocks_are_their_shortcuts_and_the_rest_is_as_initialised() -> None:
    for name in ("resnet20", "resnet50"):
        plain, zeroed = built(name).state_dict(), built(name, zero_init_last=True)
        last = "bn3" if name == "resnet50" else "bn2"
        for key, tensor in zeroed.state_dict().items():
            if key.endswith(f".{last}.weight"):
                assert not tensor.any()
            else:
                assert torch.equal(tensor, plain[key]), key
        block = zeroed.get_submodule("layer2.1").eval()
        images = torch.randn(2, plain["layer2.1.conv1.weight"].shape[1], 8, 8)
        assert torch.equal(block(images), images.relu())


@pytest.mark.parametrize("option", ["blurpool", "zero_init_last"])
def test_networks_without_such_layers_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"model.{option} = True: this network has no"):
        built("conv4" if option == "blurpool" else "vgg19", **{option: True})
