"""Are convolutions and linear layers prunable, and nothing else?"""

from __future__ import annotations

import pytest
from torch import nn

from ghostmask.engine.errors import InputError
from ghostmask.masks.prunable import prunable_weights


def _net() -> nn.Module:
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 4, 3))
    net.add_module("bn", nn.BatchNorm2d(4))
    net.add_module("block", nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 4)))
    net.add_module("fc", nn.Linear(4, 2))
    return net


def test_names_come_in_module_order_and_refer_to_the_parameters_themselves() -> None:
    net = _net()
    weights = prunable_weights(net)
    assert list(weights) == ["conv.weight", "block.0.weight", "block.1.weight", "fc.weight"]
    assert all(weight is net.get_parameter(name) for name, weight in weights.items())


def test_patterns_leave_weights_dense() -> None:
    assert list(prunable_weights(_net(), ["fc.weight", "block.*"])) == ["conv.weight"]


def test_a_shared_weight_is_pruned_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert list(prunable_weights(net)) == ["0.weight"]


@pytest.mark.parametrize("pattern", ["classifier.weight", "bn.weight", "FC.weight", "fc"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match=rf"mask.dense_layers = '{pattern}': matches no prunable weight.*fc\.weight"):
        prunable_weights(_net(), ["conv.weight", pattern])


def test_leaving_nothing_to_prune_is_refused() -> None:
    with pytest.raises(InputError, match=r"mask.dense_layers = \['\*'\]: leaves nothing to prune"):
        prunable_weights(_net(), ["*"])
