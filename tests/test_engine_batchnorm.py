"""Are batch norm's statistics those of the images that were given: of each part, over all ranks, and after a resume?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_data import MemoryData
from torch import Tensor, nn

from ghostmask.engine.batchnorm import PartStatistics, batch_statistics, reestimate, restored, statistics
from ghostmask.engine.checkpoint.pieces import Piece
from ghostmask.engine.data import Batch, Parts
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single

V = 4
WHOLE = Parts(V, 0, V)


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3), nn.BatchNorm2d(2))


def mine(world: World) -> Parts:
    count = V // world.size
    return Parts(V, world.rank * count, count)


def batches(parts: Parts, count: int = 3) -> list[Batch]:
    data = MemoryData(single(), parts=parts)
    return [batch for _, batch in zip(range(count), data.train(0), strict=False)]


def test_reestimated_statistics_are_the_mean_over_the_parts_and_leave_the_rest_alone() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    layer = net[0]
    layer.num_batches_tracked += 7
    given = batches(WHOLE)
    reestimate(net, given, WHOLE, single())
    parts = [images for batch in given for images in batch.images.chunk(V)]
    torch.testing.assert_close(layer.running_mean, torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0))
    assert not layer.training
    assert layer.momentum == pytest.approx(0.1)
    assert int(layer.num_batches_tracked) == 7


def test_batch_statistics_are_used_and_running_ones_kept() -> None:
    layer = nn.BatchNorm2d(3, affine=False).eval()
    before = {n: b.clone() for n, b in layer.named_buffers()}
    (given,) = batches(WHOLE, 1)
    with batch_statistics(layer):
        out = layer(given.images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())
    assert not layer.training
    assert not torch.allclose(layer(given.images), out)


def test_statistics_are_restored_also_after_an_exception() -> None:
    net = network()
    before = {n: b.clone() for n, b in statistics(net).items()}
    with pytest.raises(KeyError), restored(net):  # noqa: PT012
        net(batches(WHOLE, 1)[0].images)
        assert not torch.equal(statistics(net)["1.running_mean"], before["1.running_mean"])
        raise KeyError
    assert all(torch.equal(b, before[n]) for n, b in statistics(net).items())


def passed(net: nn.Module, parts: Parts, given: list[Batch], sets: PartStatistics) -> None:
    for batch in given:
        for number, images in enumerate(batch.images.chunk(parts.count)):
            sets.enter(number)
            net(images)
            sets.leave(number)


def part_sets(world: World) -> dict[str, Any]:
    """Three steps; then the statistics of each part, their mean, and the other buffers."""
    net, parts = network(), mine(world)
    sets = PartStatistics(net, parts)
    passed(net, parts, batches(parts), sets)
    entries = {n: p for n, p in sets.entries().items() if isinstance(p, Piece)}
    each = {n: (p.full_numel, p.start, p.tensor.clone()) for n, p in entries.items()}
    count = int(net[1].num_batches_tracked)
    sets.average(world)
    return {"each": each, "mean": {n: b.clone() for n, b in statistics(net).items()}, "count": count, "net": net,
            "after": {n: p.tensor.clone() for n, p in sets.entries().items() if isinstance(p, Piece)}}  # fmt: skip


def test_every_part_has_the_statistics_of_a_network_that_saw_its_images_alone() -> None:
    found = part_sets(single())
    for part in range(V):
        net = network()
        for batch in batches(Parts(V, part, 1)):
            net(batch.images)
        for name, buffer in statistics(net).items():
            full, start, rows = found["each"][name]
            assert (full, start) == (V * buffer.numel(), 0)
            assert torch.equal(rows.view(V, -1)[part], buffer), (part, name)
        assert found["count"] == int(net[1].num_batches_tracked) == 3
    assert len({tuple(row.tolist()) for row in found["each"]["1.running_mean"][2].view(V, -1)}) == V


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_statistics_and_their_mean_are_the_same_bits_on_any_number_of_ranks(ranks: int) -> None:
    alone, everyone = part_sets(single()), run_distributed(part_sets, ranks)
    for name, (full, _, rows) in alone["each"].items():
        assert {r["each"][name][0] for r in everyone} == {full}
        assert [r["each"][name][1] for r in everyone] == [full // ranks * i for i in range(ranks)]
        assert torch.equal(torch.cat([r["each"][name][2] for r in everyone]), rows)
        mean = rows.view(V, -1).double().mean(0).float()
        for r in everyone:
            assert torch.equal(r["mean"][name], alone["mean"][name])
            assert torch.equal(r["mean"][name], mean)
            assert torch.equal(r["after"][name].view(V // ranks, -1), mean.expand(V // ranks, -1))


def test_loaded_statistics_go_on_as_those_that_were_saved() -> None:
    net = network()
    sets, given = PartStatistics(net, WHOLE), batches(WHOLE, 4)
    passed(net, WHOLE, given[:2], sets)
    saved = {n: Piece(p.full_numel, p.start, p.tensor.clone()) for n, p in sets.entries().items()}  # type: ignore[union-attr]
    other = network()
    resumed = PartStatistics(other, WHOLE)
    resumed.load(saved)
    for n, s in ((net, sets), (other, resumed)):
        passed(n, WHOLE, given[2:], s)
    for name, piece in sets.entries().items():
        assert torch.equal(resumed.entries()[name].tensor, piece.tensor), name  # type: ignore[union-attr]


def test_a_network_without_batch_norm_has_no_statistics() -> None:
    net = nn.Linear(3, 2)
    sets = PartStatistics(net, WHOLE)
    sets.enter(1)
    sets.leave(1)
    sets.average(single())
    assert sets.entries() == {}
    reestimate(net, [], WHOLE, single())


def reestimated(world: World) -> dict[str, Tensor]:
    net, parts = network(), mine(world)
    reestimate(net, batches(parts), parts, world)
    return {n: b.clone() for n, b in statistics(net).items()}


def test_ranks_end_with_the_statistics_of_all_ranks_parts_bit_for_bit() -> None:
    alone = reestimated(single())
    for rank in run_distributed(reestimated, 2):
        assert all(torch.equal(rank[n], alone[n]) for n in alone)
