"""Which activation does a network have: its ReLUs, or a soft one in their place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.config import require


class SoftActivation(nn.Module):
    """PSwish, x sigmoid(beta x): Swish at beta = 1, ReLU in the limit; or Mish, x tanh(softplus(x)).

    beta: () float32 tensor, shared by all activations of a network so that one write changes them all.
    """

    def __init__(self, kind: str, beta: Tensor) -> None:
        super().__init__()
        self.kind = kind
        # A tensor, since a number that changes would make torch.compile start again; a function of the position, so
        # no checkpoint needs it.
        self.register_buffer("beta", beta, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mish":
            return functional.mish(x)
        if self.kind == "swish":
            return functional.silu(x)
        beta = self.get_buffer("beta")
        return functional.silu(x * beta) / beta


def soften(net: nn.Module, kind: str, beta: Tensor) -> Callable[[], None]:
    """Put a soft activation ("pswish", "swish", "mish") in the place of every nn.ReLU; returns what puts them back.

    No name of a parameter or buffer in the state dict of `net` changes.
    """
    places = [(parent, name, relu) for _, parent, name, relu in _relus(net)]
    soft = SoftActivation(kind, beta)
    for parent, name, _ in places:
        setattr(parent, name, soft)

    def harden() -> None:
        for parent, name, relu in places:
            setattr(parent, name, relu)

    return harden


def require_relus(net: nn.Module) -> None:
    """Raise InputError where `soften` would find nothing to replace."""
    fix = "this network has no nn.ReLU to put a soft activation in place of; set it to false"
    require(next(_relus(net), None) is not None, "tost.ghost_swish", True, fix)


@torch.no_grad()
def zeros_after_activations(net: nn.Module, run: Callable[[], object]) -> dict[str, tuple[Tensor, int]]:
    """Call `run`, which calls `net`, and count: name -> (exact zeros, values) of each activation's output.

    A module that is called several times, as in torchvision's blocks, appears as layer1.0.relu.0, layer1.0.relu.1, ...
    """
    counts: dict[str, tuple[Tensor, int]] = {}
    calls: dict[str, int] = {}

    def counter(place: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = module.forward

        def counting(x: Tensor) -> Tensor:
            out: Tensor = forward(x)
            number = calls.get(place, 0)
            calls[place] = number + 1
            counts[f"{place}.{number}"] = ((out == 0).sum(), out.numel())
            return out

        return counting

    # One soft activation may stand in many places: each place gets a counting module of its own for this call.
    places = list(_relus(net))
    try:
        for place, parent, name, module in places:
            setattr(parent, name, _Counting(counter(place, module)))
        run()
    finally:
        for _, parent, name, module in places:
            setattr(parent, name, module)
    return counts


class _Counting(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _relus(net: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(place, parent, its name for it, activation) of every activation of the network."""
    for path, parent in net.named_modules():
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.ReLU | SoftActivation):
                yield f"{path}.{name}".lstrip("."), parent, name, child
