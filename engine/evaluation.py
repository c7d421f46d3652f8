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

TOP = 5
"""Among how many of the likeliest classes an image's own is looked for, beside the likeliest."""
VOTE_BATCHES = 8
"""Batches of an evaluation between two looks at whether to stop."""


@dataclass(frozen=True)
class Score:
    """accuracy: top-1 fraction in [0, 1]; loss: mean cross-entropy in nats, without label smoothing; num_images; top5:
    the share of images whose class is among the five likeliest, None with five classes or fewer."""

    accuracy: float
    loss: float
    num_images: int
    top5: float | None = None
    per_class: Tensor | None = None
    """(classes, 3) int64: of the images of each class those that are right, that are among the five likeliest (0 where
    there is no top5), and all; None unless it was asked for."""

    @property
    def text(self) -> str:
        """The accuracies, to print: "71.20%, top-5 90.10%"."""
        return accuracy_text(self.accuracy, self.top5)


def accuracy_text(accuracy: float, top5: float | None) -> str:
    """Top-1 and, where there is one, top-5 accuracy, to print."""
    return f"{accuracy:.2%}" if top5 is None else f"{accuracy:.2%}, top-5 {top5:.2%}"


class EvaluationStopped(Exception):
    """Some rank was asked to stop: all ranks leave the evaluation, without a score."""


@torch.no_grad()
def score(
    model: nn.Module, batches: Iterable[Batch], world: World, precision: str = "fp32", *, flip: bool = False,
    asked_to_stop: Callable[[], bool] | None = None, num_classes: int = 0,
) -> Score:  # fmt: skip
    """Collective: `model` in the mode it is in (call .eval() first) over every rank's batches.

    Ranks may have different numbers of batches: totals are reduced at the end. flip: score the mean of the logits of
    each image and its mirror image. asked_to_stop: looked at every VOTE_BATCHES batches; all ranks raise
    EvaluationStopped where it is true on some rank. num_classes: count each class by itself; 0 = do not.
    """
    totals = torch.zeros(5, dtype=torch.float64, device=world.device)
    classes = torch.zeros(num_classes, 3, dtype=torch.int64, device=world.device)
    for number, batch in enumerate(_until(batches, world, asked_to_stop), 1):
        with autocast(world.device, precision):
            logits = model(batch.images).float()
            if flip:
                logits = (logits + model(batch.images.flip(3)).float()) / 2
        totals += _sums(logits.float(), batch.labels)
        if num_classes:
            classes.index_add_(0, batch.labels, _each(logits, batch.labels))
        world.pulse.tick(f"evaluation, batch {number}")
    correct, in_five, ranked, loss, count = world.all_reduce(totals).tolist()
    top5 = in_five / ranked if ranked else None
    per_class = world.all_reduce(classes) if num_classes else None
    return Score(correct / max(count, 1), loss / max(count, 1), int(count), top5, per_class)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """(3,) int64: images whose label has the largest of the logits (N, K), is among their five largest, and of how many
    the latter was asked: of none where it is always so, with K <= 5."""
    correct = logits.argmax(1) == labels
    if logits.shape[1] <= TOP:
        return torch.cat([correct.sum()[None], labels.new_zeros(2)])
    in_five = correct | (logits.topk(TOP, 1).indices == labels[:, None]).any(1)
    return torch.stack([correct.sum(), in_five.sum(), torch.ones_like(labels).sum()])


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


def _each(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, 3) int64: of every image, as `hits` counts them, whether it is right and in five, and 1."""
    right = logits.argmax(1) == labels
    ranked = logits.shape[1] > TOP
    in_five = right | (logits.topk(TOP, 1).indices == labels[:, None]).any(1) if ranked else torch.zeros_like(right)
    return torch.stack([right, in_five, torch.ones_like(right)], 1).long()


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    loss = functional.cross_entropy(logits, labels, reduction="sum").double()
    return torch.cat([hits(logits, labels).double(), loss[None], torch.ones_like(labels).sum()[None].double()])
