"""Are operations counted as the literature counts them, and is the network left as it was?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.flops import count_flops


def test_resnet50_needs_4_1_billion_multiply_adds_at_224_pixels() -> None:
    with torch.device("meta"):
        net = resnet.resnet50()
    dense, sparse = count_flops(net, (3, 224, 224), None)
    assert dense == sparse == 2 * 4_089_184_256  # torchvision's table says 4.09 G multiply-adds


def test_each_layer_is_scaled_by_its_own_share_of_kept_weights() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    convolution, grouped, linear = 16 * 8 * 3 * 9, 16 * 8 * 2 * 9, 128 * 5
    dense, sparse = count_flops(net, (3, 8, 8), {"0.weight": 54, "3.weight": 0})
    assert dense == 2 * (convolution + grouped + linear)
    assert sparse == 2 * (16 * 54 + grouped)


def test_keeping_everything_costs_as_much_as_dense_and_nothing_costs_nothing() -> None:
    net = resnet.resnet18(num_classes=10)
    sizes = {name: w.numel() for name, w in prunable_weights(net).items()}
    dense, _ = count_flops(net, (3, 64, 64), None)
    assert count_flops(net, (3, 64, 64), sizes) == (dense, dense)
    assert count_flops(net, (3, 64, 64), dict.fromkeys(sizes, 0)) == (dense, 0)


def test_a_layer_used_twice_is_counted_twice() -> None:
    layer = nn.Linear(6, 6)
    assert count_flops(nn.Sequential(nn.Flatten(), layer, layer), (1, 2, 3), {"1.weight": 9}) == (2 * 72, 2 * 18)


def test_counting_changes_nothing_in_the_network() -> None:
    net = resnet.resnet18(num_classes=10)
    net.layer1.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    count_flops(net, (3, 32, 32), None)
    assert net.training
    assert not net.layer1.training
    assert not any(module._forward_hooks for module in net.modules())
    after = net.state_dict()
    assert all(after[name].device.type == "cpu" and torch.equal(after[name], before[name]) for name in before)


def test_a_name_that_is_no_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"bn\.weight"):
        count_flops(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), (3, 1, 1), {"bn.weight": 1})
