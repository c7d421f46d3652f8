"""Which weights of a network may be pruned: those of its convolutions, linear layers and attention projections."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from ghostmask.engine.errors import InputError, bad_value

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weight is prunable, depthwise convolutions included; transposed convolutions are not among them."""
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Prunable parameters of nn.MultiheadAttention: one for queries, keys and values, or three. Its output projection is a
Linear."""


def prunable_weights(
    net: nn.Module, exclude: Sequence[str] = (), include: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The weights of a mask-free network that are pruned, by name ("layer1.0.conv1.weight"), in module order.

    Without patterns: the weights of all LAYERS and the ATTENTION parameters; no biases, no normalisation, and what two
    layers share once. Patterns are fnmatch's, or a name as it stands. include (mask.only): what is pruned at all; a
    pattern that matches none of these may name other parameters of two dimensions and more, such as embeddings.
    exclude (mask.dense_layers): what of that is not. Raises InputError for a pattern that matches nothing, where
    nothing is left, and for a weight that is not a parameter with a shape.
    """
    usual = _usual(net)
    chosen = _included(net, usual, include) if include else usual
    dense = {n for pattern in exclude for n in _matching("mask.dense_layers", pattern, "prunable weight", chosen)}
    left = {name: weight for name, weight in chosen.items() if name not in dense}
    if dense and not left:
        raise bad_value("mask.dense_layers", list(exclude), "leaves nothing to prune; remove a pattern")
    if not left:
        raise bad_value("mask.only", list(include), "the network has no convolution or linear layer; name parameters")
    return {name: _parameter(name, weight) for name, weight in left.items()}


def _usual(net: nn.Module) -> dict[str, object]:
    """name -> weight of what is pruned without patterns; not a parameter where the layer computes its weight."""
    weights: dict[str, object] = {}
    seen: set[int] = set()
    for path, module in net.named_modules():
        names = ATTENTION if isinstance(module, nn.MultiheadAttention) else ("weight",)
        for name in names if isinstance(module, (*LAYERS, nn.MultiheadAttention)) else ():
            weight = getattr(module, name)
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                weights[f"{path}.{name}".removeprefix(".")] = weight
    return weights


def _included(net: nn.Module, usual: dict[str, object], patterns: Sequence[str]) -> dict[str, object]:
    """The usual weights that a pattern matches or, where it matches none, other large parameters; in module order."""
    same = {id(weight) for weight in usual.values()}
    others = {n: p for n, p in net.named_parameters() if id(p) not in same and (is_lazy(p) or p.dim() >= 2)}
    what = "weight of two or more dimensions"
    names = dict.fromkeys(n for pattern in patterns for n in _matching("mask.only", pattern, what, usual, others))
    place = {name: index for index, (name, _) in enumerate(net.named_parameters(remove_duplicate=False))}
    return {name: (usual | others)[name] for name in sorted(names, key=lambda name: place.get(name, -1))}


def _matching(field: str, pattern: str, what: str, *choices: Collection[str]) -> list[str]:
    """The names that the pattern matches in the first of the choices in which there are any; InputError of `field`."""
    for names in choices:
        found = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
        if found:
            return found
    known = [name for names in choices for name in names]
    ends = known if len(known) <= 6 else [*known[:3], "...", *known[-2:]]
    # In a pattern [ab] is one letter, so that a part of a name with brackets does not match itself.
    escape = "; in a pattern, write [[] for a [ and [*] for a *" if any(set("[*?") & {*name} for name in known) else ""
    raise bad_value(field, pattern, f"matches no {what}; they are {', '.join(ends)}{escape}")


def _parameter(name: str, weight: object) -> nn.Parameter:
    if not isinstance(weight, nn.Parameter):
        how = "is computed by its layer (weight_norm, spectral_norm, parametrize): take that off"
        raise InputError(f"the network's {name} {how}, or name it in mask.dense_layers")
    if is_lazy(weight):
        raise InputError(
            f"the network's {name} has no shape yet (a lazy layer): call the network once before it is masked"
        )
    return weight
