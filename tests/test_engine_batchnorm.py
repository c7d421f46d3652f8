"""Are batch norm's statistics those of the images that were given, over all ranks?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ghostmask.engine.batchnorm import PartStatistics, batch_statistics, reestimate, restored, statistics
from ghostmask.engine.checkpoint.pieces import Piece
from ghostmask.engine.data import Batch, Parts
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single


def batches(seed: int, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = [3 + 2 * torch.randn(16, 3, 4, 4, generator=generator) for _ in range(count)]
    return [Batch(x, torch.zeros(16, dtype=torch.int64)) for x in images]


def test_reestimated_statistics_are_the_mean_over_the_batches_and_leave_the_mode_alone() -> None:
    layer = nn.BatchNorm2d(3).eval()
    given = batches(1, 5)
    reestimate(layer, given, Parts(), single())
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


def reestimated(world: World) -> list[Tensor]:
    layer = nn.BatchNorm2d(3)
    own = Parts(4, world.rank * 4 // world.size, 4 // world.size)
    given = []
    for images, labels in batches(1, 3):
        mine = torch.cat([images[p::4] for p in range(own.first, own.first + own.count)])
        given.append(Batch(mine, labels))
    reestimate(layer, given, own, world)
    return [b.clone() for b in statistics(layer).values()]


def test_statistics_estimated_part_by_part_are_the_same_bits_on_any_number_of_ranks() -> None:
    alone = reestimated(single())
    for ranks in (2, 4):
        for found in run_distributed(reestimated, ranks):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_what_is_restored_comes_back() -> None:
    layer = nn.BatchNorm2d(3)
    before = {n: b.clone() for n, b in statistics(layer).items()}
    with restored(layer):
        layer(torch.randn(4, 3, 2, 2) + 5)
        assert not torch.equal(next(iter(statistics(layer).values())), next(iter(before.values())))
    assert all(torch.equal(b, before[n]) for n, b in statistics(layer).items())


def seen_by_parts(world: World) -> tuple[dict[str, Tensor], dict[str, tuple[int, int, Tensor]], int]:
    """Two steps of four parts: each rank's mean statistics, and what it writes into a checkpoint."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    own = Parts(4, world.rank * 4 // world.size, 4 // world.size)
    parts = PartStatistics(net, own)
    for images, _ in batches(3, 2):
        for number in range(own.count):
            parts.enter(number)
            net(images[own.first + number :: 4])
            parts.leave(number)
    pieces = {}
    for name, piece in parts.entries().items():
        assert isinstance(piece, Piece)
        pieces[name] = (piece.full_numel, piece.start, piece.tensor.clone())
    parts.average(world)
    counted = int(net[0].num_batches_tracked)  # type: ignore[arg-type]
    return {n: b.clone() for n, b in statistics(net).items()}, pieces, counted


def test_every_part_has_statistics_of_its_own_whatever_rank_computes_it() -> None:
    alone, (whole,) = run_distributed(seen_by_parts, 1)[0], run_distributed(seen_by_parts, 1)
    assert alone[2] == 2, "each step counts once"
    for ranks in (2, 4):
        found = run_distributed(seen_by_parts, ranks)
        for mean, _, counted in found:
            assert counted == 2
            assert all(torch.equal(mean[n], alone[0][n]) for n in mean)
        for name, (full, _, rows) in whole[1].items():
            assert full == 12
            assert torch.equal(torch.cat([pieces[name][2] for _, pieces, _ in found]), rows)
            assert [pieces[name][1] for _, pieces, _ in found] == [i * 12 // ranks for i in range(ranks)]
    first, second = whole[1]["0.running_mean"][2].view(4, 3)[:2]
    assert not torch.equal(first, second)


def test_statistics_read_back_are_those_of_the_parts() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    parts = PartStatistics(net, Parts(2, 0, 2))
    entries = parts.entries()
    for piece in entries.values():
        assert isinstance(piece, Piece)
        piece.tensor.copy_(torch.arange(6.0))
    parts.load(entries)
    parts.enter(0)
    assert statistics(net)["0.running_mean"].tolist() == [0, 1, 2]
    parts.enter(1)
    assert statistics(net)["0.running_mean"].tolist() == [3, 4, 5]
