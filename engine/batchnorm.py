"""Batch norm's running statistics: one set for each part of the batch, averaged, or estimated anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghostmask.engine.checkpoint.pieces import Piece
from ghostmask.engine.data import Batch, Parts
from ghostmask.engine.precision import autocast
from ghostmask.engine.sharding.average import AVERAGE, follow
from ghostmask.engine.world import World


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norm layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that differ between parts: running mean and variance, seen on the part's own images."""
    return {
        f"{name}.{key}": buffer
        for name, layer in batch_norms(model).items()
        for key, buffer in layer.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


class PartStatistics:
    """The running statistics of each part that this rank computes; in the model stand those of one of them.

    What a part's statistics are depends on its images alone, and so not on the number of ranks.
    """

    def __init__(self, model: nn.Module, parts: Parts, average: float = 0.0) -> None:
        """average: decay of the moving average of each part's statistics (see sharding.average); 0: there is none."""
        self.model, self.parts, self.decay = model, parts, average
        self._counters = [b for _, b in _counters(model)]
        buffers = statistics(model)
        ends = list(accumulate(b.numel() for b in buffers.values()))
        self._places = [(n, end - b.numel(), end) for (n, b), end in zip(buffers.items(), ends, strict=True)]
        self._flat = _flattened(list(buffers.values()))
        self._sets = [self._flat] if parts.count == 1 else [self._flat.clone() for _ in range(parts.count)]
        self._averages = [s.clone() for s in self._sets] if average else []
        self._counts: list[Tensor] = []

    def enter(self, part: int) -> None:
        """Before the forward pass of this rank's part number `part`."""
        if self.parts.count == 1:
            return
        self._flat.copy_(self._sets[part])
        # Each part counts for itself; the numbers are the same for all of them.
        self._counts = [c.clone() for c in self._counters]

    def leave(self, part: int) -> None:
        """After it."""
        if self.parts.count == 1:
            return
        self._sets[part].copy_(self._flat)
        if part < self.parts.count - 1:
            for counter, before in zip(self._counters, self._counts, strict=True):
                counter.copy_(before)

    @torch.no_grad()
    def average(self, world: World) -> None:
        """Collective: every part's statistics, and the model's, become the mean over all parts (one all-reduce)."""
        if not self._flat.numel() or self.parts.total == 1:
            return
        for sets in (self._sets, self._averages) if self._averages else (self._sets,):
            # In float64, so that the mean does not depend on the order of its parts.
            total = torch.stack([s.double() for s in sets]).sum(0)
            mean = world.all_reduce(total).div_(self.parts.total)
            for part in sets:
                part.copy_(mean)
        self._flat.copy_(self._sets[-1])

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """After update number `updates`, from 0: the averages follow."""
        for average, part in zip(self._averages, self._sets, strict=False):
            follow(average, part, self.decay, updates)

    @torch.no_grad()
    def begin_averages(self) -> None:
        """The averages, where there are any, are what they are made of."""
        for average, part in zip(self._averages, self._sets, strict=False):
            average.copy_(part)

    @torch.no_grad()
    def deliver(self) -> bool:
        """Put the averages of this rank's last part into the model, where there are any; returns whether there are. All
        parts' are equal after `average`."""
        if self._averages:
            self._flat.copy_(self._averages[-1])
        return bool(self._averages)

    def entries(self) -> dict[str, Tensor | Piece]:
        """For a checkpoint: name -> this rank's parts of (parts * numel,), part after part."""
        found: dict[str, Tensor | Piece] = {}
        for name, low, high in self._places:
            for key, sets in self._kept(name):
                rows = torch.stack([s[low:high] for s in sets]).reshape(-1)
                found[key] = Piece(self.parts.total * (high - low), self.parts.first * (high - low), rows)
        return found

    def load(self, entries: dict[str, Tensor | Piece]) -> None:
        """Take back what `entries` gave, filled; entries beyond the model's are passed over."""
        for name, low, high in self._places:
            for key, sets in self._kept(name):
                piece = entries[key]
                assert isinstance(piece, Piece)
                for part, row in zip(sets, piece.tensor.view(self.parts.count, -1), strict=True):
                    part[low:high] = row
        self._flat.copy_(self._sets[-1])

    def _kept(self, name: str) -> list[tuple[str, list[Tensor]]]:
        """Key of a checkpoint -> what it holds of a buffer."""
        return [(name, self._sets), *([(f"{name}.{AVERAGE}", self._averages)] if self._averages else [])]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Batch], parts: Parts, world: World, precision: str = "fp32") -> None:
    """Collective: running statistics of `model` as the plain mean over the parts of `batches`.

    For weights that were changed otherwise than by training, such as by a new mask.
    """
    layers, buffers = batch_norms(model), list(statistics(model).values())
    if not buffers:
        return
    momentum = {name: layer.momentum for name, layer in layers.items()}
    counts, training = {name: buffer.clone() for name, buffer in _counters(model)}, model.training
    for layer in layers.values():
        layer.momentum = 1.0  # the running statistics become those of the part
    model.train()
    total, number = torch.zeros(sum(b.numel() for b in buffers), dtype=torch.float64, device=buffers[0].device), 0
    for batch in batches:
        for images in batch.images.chunk(parts.count):
            with autocast(images.device, precision):
                model(images)
            total += torch.cat([b.reshape(-1) for b in buffers])
            number += 1
    for name, layer in layers.items():
        layer.momentum = momentum[name]
    for name, counter in _counters(model):
        counter.copy_(counts[name])
    model.train(training)
    mean = world.all_reduce(total).div_(number * world.size)
    for buffer, value in zip(buffers, torch.split(mean, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Within, running statistics may be changed; afterwards they are what they were."""
    before = {name: buffer.clone() for name, buffer in statistics(model).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in statistics(model).items():
                buffer.copy_(before[name])


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Within, batch norm uses each batch's own statistics and its running ones stay as they are."""
    layers = batch_norms(model).values()
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.train()
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before, strict=True):
            layer.train(training)
            layer.track_running_stats = tracking


def _counters(model: nn.Module) -> list[tuple[str, Tensor]]:
    layers = batch_norms(model).items()
    return [(name, layer.num_batches_tracked) for name, layer in layers if layer.num_batches_tracked is not None]


@torch.no_grad()
def _flattened(buffers: list[Tensor]) -> Tensor:
    """One buffer of which all of these become views: a part's statistics are then swapped by one copy."""
    if not buffers:
        return torch.zeros(0)
    flat = torch.cat([b.reshape(-1) for b in buffers])
    for buffer, view in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.data = view.view_as(buffer)
    return flat
