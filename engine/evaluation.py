"""How good is a network on a set of images: accuracy and loss, each image counted once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.data import Batch
from ghostmask.engine.precision import autocast
from ghostmask.engine.world import World


@dataclass(frozen=True)
class Score:
    """accuracy: top-1 fraction in [0, 1]; loss: mean cross-entropy in nats, without label smoothing; num_images."""

    accuracy: float
    loss: float
    num_images: int


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch], world: World, precision: str = "fp32") -> Score:
    """Collective: `model` in the mode it is in (call .eval() first) over every rank's batches.

    Ranks may have different numbers of batches: nothing is reduced before the end.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in batches:
        with autocast(world.device, precision):
            logits = model(batch.images)
        totals += _sums(logits.float(), batch.labels)
    correct, loss, count = world.all_reduce(totals).tolist()
    return Score(correct / max(count, 1), loss / max(count, 1), int(count))


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    correct = logits.argmax(1) == labels
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([correct.sum().double(), loss.double(), torch.ones_like(correct).sum().double()])
