"""Are batch norm's statistics those of the images that were given, over all ranks?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ghostmask.engine.batchnorm import average_buffers, batch_statistics, local_buffers, reestimate
from ghostmask.engine.data import Batch
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single


def batches(seed: int, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = [3 + 2 * torch.randn(16, 3, 4, 4, generator=generator) for _ in range(count)]
    return [Batch(x, torch.zeros(16, dtype=torch.int64)) for x in images]


def test_reestimated_statistics_are_the_mean_over_the_batches_and_leave_the_mode_alone() -> None:
    layer = nn.BatchNorm2d(3).eval()
    given = batches(1, 5)
    reestimate(layer, given, single())
    assert isinstance(layer.running_mean, Tensor)
    assert isinstance(layer.running_var, Tensor)
    means = torch.stack([b.images.mean((0, 2, 3)) for b in given]).mean(0)
    variances = torch.stack([b.images.var((0, 2, 3)) for b in given]).mean(0)
    torch.testing.assert_close(layer.running_mean, means)
    torch.testing.assert_close(layer.running_var, variances)
    assert not layer.training
    assert layer.momentum == pytest.approx(0.1)


def test_batch_statistics_are_used_and_running_ones_kept() -> None:
    layer = nn.BatchNorm2d(3, affine=False).eval()
    before = {n: b.clone() for n, b in layer.named_buffers()}
    (given,) = batches(2, 1)
    with batch_statistics(layer):
        out = layer(given.images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())
    assert not layer.training
    assert not torch.allclose(layer(given.images), out)


def reestimate_on_ranks(world: World) -> list[Tensor]:
    layer = nn.BatchNorm2d(3)
    reestimate(layer, batches(1, 4)[world.rank :: world.size], world)
    average_buffers(layer, world)  # once more: equal statistics stay what they are
    return list(local_buffers(layer).values())


def test_ranks_end_with_the_statistics_of_all_ranks_batches() -> None:
    alone = reestimate_on_ranks(single())
    for rank in run_distributed(reestimate_on_ranks, 2):
        for here, whole in zip(rank, alone, strict=True):
            torch.testing.assert_close(here, whole)
