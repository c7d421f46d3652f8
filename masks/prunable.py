"""Which weights of a network may be pruned: those of its convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ghostmask.engine.errors import bad_value


def prunable_weights(net: nn.Module, dense_layers: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The prunable weights of a mask-free network by name ("layer1.0.conv1.weight"), in module order.

    These are the weights of every Conv2d and Linear, without biases and batch norm; a weight that two layers share
    appears once. dense_layers: fnmatch patterns of names that are left out. Raises InputError for a pattern that
    matches nothing and where nothing is left.
    """
    weights: dict[str, nn.Parameter] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and all(module.weight is not w for w in weights.values()):
            weights[f"{name}.weight"] = module.get_parameter("weight")
    for pattern in dense_layers:
        if not any(fnmatchcase(name, pattern) for name in weights):
            raise bad_value(
                "mask.dense_layers", pattern, f"matches no prunable weight; they are {', '.join(_ends(list(weights)))}"
            )
    left = {n: w for n, w in weights.items() if not any(fnmatchcase(n, pattern) for pattern in dense_layers)}
    if not left:
        raise bad_value("mask.dense_layers", list(dense_layers), "leaves nothing to prune; remove a pattern")
    return left


def _ends(names: list[str]) -> list[str]:
    return names if len(names) <= 6 else [*names[:3], "...", *names[-2:]]
