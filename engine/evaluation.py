"""How good is a network on a set of images: accuracy and loss, each image counted once over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.data import Batch
from ghostmask.engine.precision import autocast
from ghostmask.engine.world import World

VOTE_BATCHES = 8
"""Batches of an evaluation between two looks at whether to stop."""


@dataclass(frozen=True)
class Score:
    """accuracy: top-1 fraction in [0, 1]; loss: mean cross-entropy in nats, without label smoothing; num_images."""

    accuracy: float
    loss: float
    num_images: int


class EvaluationStopped(Exception):
    """Some rank was asked to stop: all ranks leave the evaluation, without a score."""


@torch.no_grad()
def score(
    model: nn.Module, batches: Iterable[Batch], world: World, precision: str = "fp32", *,
    asked_to_stop: Callable[[], bool] | None = None,
) -> Score:  # fmt: skip
    """Collective: `model` in the mode it is in (call .eval() first) over every rank's batches.

    Ranks may have different numbers of batches: totals are reduced at the end. asked_to_stop: looked at every
    VOTE_BATCHES batches; all ranks raise EvaluationStopped where it is true on some rank.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    for number, batch in enumerate(_until(batches, world, asked_to_stop), 1):
        with autocast(world.device, precision):
            logits = model(batch.images)
        totals += _sums(logits.float(), batch.labels)
        world.pulse.tick(f"evaluation, batch {number}")
    correct, loss, count = world.all_reduce(totals).tolist()
    return Score(correct / max(count, 1), loss / max(count, 1), int(count))


def _until(batches: Iterable[Batch], world: World, asked_to_stop: Callable[[], bool] | None) -> Iterator[Batch]:
    """Collective: the batches, as long as nobody was asked to stop. A rank that has no more goes on voting."""
    iterator = iter(batches)
    if asked_to_stop is None:
        yield from iterator
        return
    more = True
    while more:
        left = VOTE_BATCHES
        for batch in islice(iterator, VOTE_BATCHES):
            left -= 1
            yield batch
        votes = torch.tensor([float(asked_to_stop()), float(left == 0)], device=world.device)
        stop, unfinished = world.all_reduce(votes).tolist()
        if stop:
            raise EvaluationStopped
        more = unfinished > 0


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    correct = logits.argmax(1) == labels
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([correct.sum().double(), loss.double(), torch.ones_like(correct).sum().double()])
