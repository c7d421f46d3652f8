"""How does a network learn from another one: the teacher's logits for every part of a batch, and who the teacher is."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ghostmask.engine.data import PartBatch
from ghostmask.engine.errors import InputError, bad_value
from ghostmask.engine.hooks import Hook
from ghostmask.engine.precision import autocast

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer


class Distillation(Hook):
    """The teacher sees what the network sees, mixed images too (it stands behind `Mixing`), once per part."""

    name = "distill"

    def __init__(self, teacher: nn.Module, path: str) -> None:
        """teacher: images -> logits, in evaluation mode, on this rank's device; it stays as it is."""
        self.teacher, self.path = teacher, path
        self.identity = identity(teacher)

    def on_start(self, trainer: Trainer) -> None:
        """Raises InputError where ranks, on machines of their own, have read other teachers."""
        found = trainer.world.all_gather_object(self.identity)
        if len(set(found)) > 1:
            other = next(rank for rank, each in enumerate(found) if each != found[0])
            fix = f"rank {other} reads other weights there than rank 0; give all machines the same file"
            raise bad_value("distill.path", self.path, fix)

    @torch.no_grad()
    def on_part(self, trainer: Trainer, number: int, part: PartBatch) -> PartBatch:
        layout = torch.channels_last if trainer.config.channels_last else torch.contiguous_format
        with autocast(part.images.device, trainer.config.precision):
            logits = self.teacher(part.images.contiguous(memory_format=layout))
        return part._replace(teacher=logits.float())

    def state_dict(self) -> dict[str, Any]:
        return {"path": self.path, "identity": self.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises InputError where the file holds another teacher than when the run started."""
        if state["path"] == self.path and state["identity"] != self.identity:
            raise InputError(
                f"distill.path = {self.path!r}: holds another network than the one that this run has learned from; "
                "bring that one back, or give the other one another name and start a new run with it"
            )


def identity(net: nn.Module) -> str:
    """A digest of the names and values of a network's state."""
    digest = sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
