"""Are convolutions, linear layers and attention prunable, and nothing else unless it is named?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from ghostmask.engine.errors import InputError
from ghostmask.masks.prunable import prunable_weights


def _net() -> nn.Module:
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 4, 3))
    net.add_module("bn", nn.BatchNorm2d(4))
    net.add_module("block", nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 4)))
    net.add_module("embedding", nn.Embedding(5, 4))
    net.add_module("fc", nn.Linear(4, 2))
    return net


def test_names_come_in_module_order_and_refer_to_the_parameters_themselves() -> None:
    net = _net()
    weights = prunable_weights(net)
    assert list(weights) == ["conv.weight", "block.0.weight", "block.1.weight", "fc.weight"]
    assert all(weight is net.get_parameter(name) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.Conv1d(2, 2, 3), ["weight"]),
        (nn.Conv3d(2, 2, 3), ["weight"]),
        (nn.Conv2d(4, 4, 3, groups=4), ["weight"]),
        (nn.Linear(2, 2), ["weight"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (
            nn.TransformerEncoderLayer(4, 2, 8),
            ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_of_every_usual_layer_are_prunable(layer: nn.Module, names: list[str]) -> None:
    assert list(prunable_weights(layer)) == names


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(2, 2, 2), nn.Embedding(3, 2), nn.GroupNorm(2, 4), nn.Bilinear(2, 2, 2), nn.GRU(2, 2)]
)
def test_no_other_layer_is_pruned_unless_it_is_named(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(2, 2), layer)
    assert list(prunable_weights(net)) == ["0.weight"]
    with pytest.raises(InputError, match=r"mask.only = \[\]: the network has no convolution or linear layer"):
        prunable_weights(layer)


def test_patterns_leave_weights_dense() -> None:
    assert list(prunable_weights(_net(), ["fc.weight", "block.*"])) == ["conv.weight"]


def test_what_is_included_is_all_that_is_pruned_in_module_order() -> None:
    assert list(prunable_weights(_net(), include=["fc.weight", "block.*"])) == [
        "block.0.weight", "block.1.weight", "fc.weight",
    ]  # fmt: skip
    assert list(prunable_weights(_net(), ["block.1.*"], ["fc.weight", "block.*"])) == ["block.0.weight", "fc.weight"]


def test_only_a_pattern_that_matches_no_usual_weight_names_other_parameters() -> None:
    assert list(prunable_weights(_net(), include=["*.weight"])) == list(prunable_weights(_net()))
    assert list(prunable_weights(_net(), include=["*", "emb*"])) == [
        "conv.weight", "block.0.weight", "block.1.weight", "embedding.weight", "fc.weight",
    ]  # fmt: skip
    assert list(prunable_weights(nn.Embedding(3, 2), include=["weight"])) == ["weight"]


def test_a_shared_weight_is_pruned_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3))
    net[1].weight = net[2].weight = net[0].weight
    assert list(prunable_weights(net)) == ["0.weight"]
    assert list(prunable_weights(net, include=["*"])) == ["0.weight"]


@pytest.mark.parametrize("pattern", ["classifier.weight", "bn.weight", "FC.weight", "fc", "embedding.weight"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match=rf"mask.dense_layers = '{pattern}': matches no prunable weight.*fc\.weight"):
        prunable_weights(_net(), ["conv.weight", pattern])


@pytest.mark.parametrize("pattern", ["classifier.weight", "bn.*", "fc.bias"])
def test_an_included_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        prunable_weights(_net(), include=["conv.weight", pattern])
    begins = f"mask.only = {pattern!r}: matches no weight of two or more dimensions; they are conv.weight, "
    assert str(caught.value).startswith(begins)


def test_leaving_out_what_was_not_included_is_refused() -> None:
    with pytest.raises(InputError, match=r"mask.dense_layers = 'fc.weight': matches no .*they are conv.weight$"):
        prunable_weights(_net(), ["fc.weight"], ["conv.*"])


def test_leaving_nothing_to_prune_is_refused() -> None:
    with pytest.raises(InputError, match=r"mask.dense_layers = \['\*'\]: leaves nothing to prune"):
        prunable_weights(_net(), ["*"])


def test_names_with_brackets_and_stars_match_themselves_and_in_patterns_when_escaped() -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2), "b*": nn.Linear(2, 2), "bc": nn.Linear(2, 2)})
    left_out = {
        "a[0].weight": ["a[0].weight"], "a[[]0]*": ["a[0].weight"], "a[0]*": ["a0.weight"],
        "b*.weight": ["b*.weight"], "b[*].*": ["b*.weight"], "b*.weigh?": ["b*.weight", "bc.weight"],
    }  # fmt: skip
    everything = set(prunable_weights(net))
    for pattern, names in left_out.items():
        assert everything - set(prunable_weights(net, [pattern])) == set(names), pattern
    with pytest.raises(InputError, match=r"in a pattern, write \[\[\] for a \[ and \[\*\] for a \*$"):
        prunable_weights(net, ["a[[0]].weight"])


@pytest.mark.parametrize(
    "normed", [nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal]
)
def test_a_weight_that_its_layer_computes_is_refused_unless_it_stays_dense(
    normed: Callable[[nn.Module], nn.Module],
) -> None:
    net = nn.Sequential(normed(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"the network's 0.weight is computed by its layer .* mask.dense_layers$"):
        prunable_weights(net)
    assert list(prunable_weights(net, ["0.*"])) == ["1.weight"]
    assert list(prunable_weights(net, include=["1.*"])) == ["1.weight"]


@pytest.mark.parametrize("include", [[], ["*"], ["0.*"]])
def test_a_weight_without_a_shape_is_refused_in_one_line(include: list[str]) -> None:
    with pytest.raises(InputError, match=r"the network's 0.weight has no shape yet \(a lazy layer\)"):
        prunable_weights(nn.Sequential(nn.LazyConv2d(3, 1), nn.Linear(2, 2)), include=include)
