"""Where do ghost skip connections go, and how do they act on a network without becoming part of it?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.resnet import BasicBlock, Bottleneck

from ghostmask.engine.errors import bad_value


class Ghosts(nn.Module):
    """One ghost skip for each 3x3 convolution of `net`: bn(conv(x)) + alpha ghost(x), before the activation.

        x ---> conv ---> bn ---(+)---> activation        conv, bn: of the plain network, under their plain names
          \\                    /
           `--> 1x1 conv, bn --' x alpha                 ghost: in this module, beside the network

    They act by forward hooks between `attach` and `detach`; outside of that `net` computes its own function and its
    module tree, names and state dict hold no trace of them. alpha: () float32 tensor, 1 at first.
    """

    def __init__(self, net: nn.Module, seed: int) -> None:
        """seed: of the Kaiming-normal initialisation, drawn without touching torch's generators."""
        super().__init__()
        self._places = list(_places(net))
        if not self._places:
            raise bad_value("tost.ghost_skip", True, "this network has no 3x3 convolutions in blocks; set it to false")
        self._net = (net,)  # in a tuple: its parameters are not these ghosts'
        self._handles: list[RemovableHandle] = []
        self._inputs: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed % 2**63)
        for conv_name, _ in self._places:
            conv = net.get_submodule(conv_name)
            assert isinstance(conv, nn.Conv2d)
            self.add_module(_key(conv_name), _ghost(conv, generator))
        # A tensor, since a number that changes would make torch.compile start again; a function of the position, so
        # no checkpoint needs it.
        self.register_buffer("alpha", torch.ones(()), persistent=False)

    def set_alpha(self, alpha: float) -> None:
        """The factor of the forward passes that follow, in [0, 1]."""
        self.get_buffer("alpha").fill_(alpha)

    def attach(self) -> None:
        """From now on the network computes with the ghosts."""
        assert not self._handles
        for conv_name, end_name in self._places:
            start, end = self._net[0].get_submodule(conv_name), self._net[0].get_submodule(end_name)
            self._handles.append(start.register_forward_pre_hook(self._keep_input(conv_name)))
            self._handles.append(end.register_forward_hook(self._add_ghost(conv_name)))

    def detach(self) -> None:
        """From now on the network computes its own function."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def _keep_input(self, conv_name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._inputs[conv_name] = arguments[0]

        return hook

    def _add_ghost(self, conv_name: str) -> Any:
        ghost = self.get_submodule(_key(conv_name))

        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen: Tensor = ghost(self._inputs.pop(conv_name))
            return output + seen * self.get_buffer("alpha")

        return hook


class GhostedModel(nn.Module):
    """images -> logits of `model`, with the ghosts that act on it in one module tree, until `remove`."""

    def __init__(self, model: nn.Module, ghosts: Ghosts | None) -> None:
        super().__init__()
        self.model = model
        self.ghosts = ghosts

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def remove(self) -> None:
        """Take the ghosts off the network and out of the module tree."""
        if self.ghosts is not None:
            self.ghosts.detach()
        self.ghosts = None


def _places(net: nn.Module) -> Iterator[tuple[str, str]]:
    """(name of a 3x3 convolution, name of the layer whose output the ghost is added to), in module order.

    The second is the batch norm that follows the convolution, or the convolution itself where none does. In residual
    networks only the blocks count, as in the authors' code: the stem has no ghost.
    """
    for path, parent in net.named_modules():
        children = list(parent.named_children())
        if isinstance(parent, BasicBlock | Bottleneck):
            following = {f"conv{i}": f"bn{i}" for i in (1, 2, 3)}
        elif isinstance(parent, nn.Sequential):
            pairs = pairwise(children)
            following = {name: after for (name, _), (after, layer) in pairs if isinstance(layer, nn.BatchNorm2d)}
        else:
            continue
        for name, child in children:
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                yield f"{path}.{name}", f"{path}.{following.get(name, name)}"


def _ghost(conv: nn.Conv2d, generator: torch.Generator) -> nn.Module:
    """1x1 convolution of the same stride and channels, and batch norm; on the convolution's device."""
    # Made on the meta device: torch's own initialisation would draw from its global generator.
    skip = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride, bias=False, device="meta")  # type: ignore[arg-type]
    skip.to_empty(device="cpu")
    with torch.no_grad():
        skip.weight.copy_(torch.randn(skip.weight.shape, generator=generator) * (2 / conv.in_channels) ** 0.5)
    return nn.Sequential(skip, nn.BatchNorm2d(conv.out_channels)).to(conv.weight.device)


def _key(name: str) -> str:
    """The name of a convolution as torch allows it for a module: without dots."""
    return name.replace(".", "/")
