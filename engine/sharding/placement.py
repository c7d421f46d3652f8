"""Where do the parameters lie that the network computes with, and where do their gradients come from?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ghostmask.engine.sharding.reparametrization import Plain, Reparametrization
from ghostmask.engine.sharding.slices import Layout, Run, Slice
from ghostmask.engine.world import single


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are made and updated alike.

    name: prefixes their keys in checkpoints ("prunable.probability/conv1.weight"); lr: base learning rate; bf16:
    whether the network computes with bfloat16 copies, which are what ranks send each other (ZeRO stages 1 and 2);
    average: decay of a moving average of the weights, which is delivered in their place; 0: there is none.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    reparametrization: Reparametrization
    lr: float
    bf16: bool = False
    average: float = 0.0

    @property
    def differs_in_evaluation(self) -> bool:
        """Whether other parameters are delivered than those trained with."""
        return self.reparametrization.differs_in_evaluation or self.average > 0

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters' shapes by name."""
        return {name: p.shape for name, p in self.parameters.items()}


class Placement(Protocol):
    """How an optimizer reaches the parameters of its groups. One implementation per way of sharing them out."""

    @property
    def slices(self) -> Sequence[Slice]:
        """This rank's slice of each group."""
        ...

    def initial(self, group: int) -> Tensor:
        """(n,) float32: the values that the slice's parameters have; the caller keeps and changes this memory.

        For a Plain group it may be the parameters' own.
        """
        ...

    def outputs(self, group: int) -> list[tuple[Run, Tensor]]:
        """The runs of the slice, and where the network's parameters of each are to be written."""
        ...

    def gradient(self, group: int) -> Tensor:
        """(n,) float32: dL/d(parameters) of the slice, averaged over microbatches and the ranks of its world."""
        ...

    def publish(self) -> None:
        """Collective: what stands in the outputs reaches the parameters of all ranks; gradients are given up."""
        ...


class WholePlacement:
    """Every rank holds all of every group: one process, DistributedDataParallel, DeepSpeed without ZeRO.

    The parameters become views of one flat buffer per group; gradients are found on them.
    """

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        """Raises ValueError for a group whose parameters differ in type or device."""
        self._groups = groups
        self.slices, self._flat, self._gradients = [], list[Tensor](), dict[int, Tensor]()
        for group in groups:
            parameters = list(group.parameters.values())
            kinds = {(p.dtype, p.device) for p in parameters}
            if len(kinds) != 1:
                raise ValueError(
                    f"group {group.name}: its parameters are of several types or devices: {sorted(map(str, kinds))}"
                )
            ((dtype, device),) = kinds
            self._flat.append(_flattened(parameters, dtype, device))
            self.slices.append(Slice(Layout(group.shapes, 1), single(device)))

    def initial(self, group: int) -> Tensor:
        flat = self._flat[group]
        shared = flat.dtype == torch.float32 and is_own_state(self._groups[group])
        return flat if shared else flat.float().clone()

    def outputs(self, group: int) -> list[tuple[Run, Tensor]]:
        return list(self.slices[group].views(self._flat[group]))

    def gradient(self, group: int) -> Tensor:
        parameters = self._groups[group].parameters.values()
        parts = [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters]
        buffer = self._gradients.get(group)
        if buffer is None:
            buffer = self._gradients[group] = torch.empty_like(self._flat[group], dtype=torch.float32)
        if parts[0].dtype == torch.float32:
            return torch.cat(parts, out=buffer)
        return buffer.copy_(torch.cat(parts))

    def publish(self) -> None:
        """The parameters are views of the outputs."""


def is_own_state(group: ParameterGroup) -> bool:
    """Whether the group's parameters are their own state at every moment, so that they may share its memory."""
    form = group.reparametrization
    return isinstance(form, Plain) and not group.differs_in_evaluation


@torch.no_grad()
def _flattened(parameters: Sequence[nn.Parameter], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The parameters end to end in one new buffer, of which each becomes a view (and so contiguous)."""
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=dtype, device=device)
    start = 0
    for p in parameters:
        view = flat[start : start + p.numel()].view(p.shape)
        view.copy_(p)
        p.data = view
        start += p.numel()
    return flat
