"""How is a 2:4 file read and run? Needs torch and safetensors, and nothing of ghostmask: it lies beside the file.

load_two_four(path) -> (state dict for the plain network, names of the weights that are 2:4);
use_two_four(net, names) makes the network use them on an NVIDIA GPU (Ampere or later), in half precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional


def load_two_four(path: str) -> tuple[dict[str, Tensor], list[str]]:
    """(name -> float32 tensor in its own shape, names of the 2:4 weights).

    A 2:4 weight is kept as NAME, float16 (groups, 2): the two values of each group of four input channels; and
    NAME.places, uint8 (groups / 2,): where they lie, 4 bits per group, the first group in the low ones.
    """
    state, names = {}, []
    with safe_open(path, framework="pt") as file:
        shapes = json.loads(file.metadata()["two_four"])
        for name, shape in shapes.items():
            tensor = file.get_tensor(name)
            if f"{name}.places" in file.keys():  # noqa: SIM118  # the reader is no mapping
                tensor = _unpacked(tensor, file.get_tensor(f"{name}.places"), shape)
                names.append(name)
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
    return state, names


def _unpacked(values: Tensor, places: Tensor, shape: list[int]) -> Tensor:
    both = torch.stack([places & 15, places >> 4], 1).reshape(-1)[: len(values)].long()
    groups = torch.zeros(len(values), 4, dtype=values.dtype)
    # The second first: a group with one value has it at both places.
    groups.scatter_(1, (both >> 2)[:, None], values[:, 1:])
    groups.scatter_(1, (both & 3)[:, None], values[:, :1])
    out, channels, *kernel = shape
    return groups.reshape(out, *kernel, channels).movedim(-1, 1)


class Pointwise(nn.Module):
    """A 1x1 convolution as a linear layer over pixels, which takes 2:4 weights. (N, C, H, W) -> (N, O, H, W)."""

    def __init__(self, conv: nn.Conv2d, convert: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stride = conv.stride
        self.weight = nn.Parameter(convert(conv.weight.detach().flatten(1).contiguous()), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """The convolution's output, in channels_last."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        n, h, w, channels = x.shape
        y = functional.linear(x.reshape(-1, channels), self.weight, self.bias)
        return y.reshape(n, h, w, -1).permute(0, 3, 1, 2)


def use_two_four(
    net: nn.Module, names: Sequence[str],
    convert: Callable[[Tensor], Any] = torch.sparse.to_sparse_semi_structured,
) -> nn.Module:  # fmt: skip
    """`net`, on the GPU and in half precision, whose linear layers and 1x1 convolutions among `names` are 2:4 now.

    Others of them (larger kernels; less than 32 outputs or 64 inputs, or no multiple of them) run dense.
    """
    for name in names:
        path = name.removesuffix(".weight")
        layer, weight = net.get_submodule(path), net.get_parameter(name).detach()
        rows, columns = weight.shape[0], weight.shape[1:].numel()
        if rows % 32 or columns % 64:
            continue
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(convert(weight.contiguous()), requires_grad=False)
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and not any(layer.padding):
            parent = net.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], Pointwise(layer, convert))
    return net
