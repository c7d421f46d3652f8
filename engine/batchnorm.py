"""Batch norm's running statistics: averaged over ranks, or estimated anew for changed weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghostmask.engine.data import Batch
from ghostmask.engine.world import World


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norm layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def local_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that differ between ranks: running mean and variance, seen by each rank on its own images."""
    return {
        f"{name}.{key}": buffer
        for name, layer in batch_norms(model).items()
        for key, buffer in layer.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


@torch.no_grad()
def average_buffers(model: nn.Module, world: World) -> None:
    """Collective: replace every rank's running statistics by their mean over the ranks (one all-reduce)."""
    buffers = list(local_buffers(model).values())
    if not buffers or world.size == 1:
        return
    flat = torch.cat([b.reshape(-1) for b in buffers])
    world.all_reduce(flat).div_(world.size)
    for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Batch], world: World) -> None:
    """Collective: running statistics of `model` as the plain mean over `batches`, then over the ranks.

    For weights that were changed otherwise than by training, such as by a new mask. Every rank gives as many batches.
    """
    layers = batch_norms(model)
    if not layers:
        return
    momentum = {name: layer.momentum for name, layer in layers.items()}
    training = model.training
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # torch's cumulative average
    model.train()
    for batch in batches:
        model(batch.images)
    for name, layer in layers.items():
        layer.momentum = momentum[name]
    model.train(training)
    average_buffers(model, world)


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
