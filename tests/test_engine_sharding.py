"""Does every element have one owner, and are gradients added up in one order, whatever ranks and buckets there are?"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.sharding import tree
from ghostmask.engine.sharding.reducer import BucketReducer
from ghostmask.engine.sharding.slices import Layout, Slice, bucketed
from ghostmask.engine.sharding.spans import CHUNKS, Spans
from ghostmask.engine.sharding.tree import Exchange, tree_all_reduce, tree_sum
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single

ODD = {"conv": (5, 3, 3, 1), "bias": (1,), "wide": (7, 13), "empty": (0, 4), "one": (1, 1), "last": (11,)}
SHAPES = {name: torch.Size(shape) for name, shape in ODD.items()}
TOTAL = sum(shape.numel() for shape in SHAPES.values())
CUTS = list(itertools.product((1, 2, 3, 4, 7, 200), (0, 1, 40, 100, 1000), (1, 2, 16)))
"""(ranks, bucket_elements, align): also more ranks than elements, and buckets of less than an element per rank."""


def whole() -> dict[str, Tensor]:
    """Every element holds its index."""
    flat = torch.arange(TOTAL, dtype=torch.float32)
    parts = torch.split(flat, [shape.numel() for shape in SHAPES.values()])
    return {name: part.view(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def owned(layout: Layout, rank: int) -> list[int]:
    """The indices in a rank's slice, after a check that its runs and segments say the same."""
    own, inside, given = list[int](), list[float](), whole()
    for run in layout.runs(rank):
        assert run.start == len(own), "runs do not follow one another in the slice"
        own += range(run.first, run.first + run.numel)
    for s in layout.segments(rank):
        assert s.start == len(inside), "segments do not follow one another in the slice"
        assert list(SHAPES)[s.layer] == s.name
        assert s.numel > 0
        inside += given[s.name].reshape(-1)[s.offset : s.offset + s.numel].tolist()
    assert inside == own
    return own


def test_every_element_lies_in_exactly_one_run_and_one_segment() -> None:
    for ranks, elements, align in CUTS:
        layout = Layout(SHAPES, ranks, elements, align)
        everywhere = [index for rank in range(ranks) for index in owned(layout, rank)]
        assert sorted(everywhere) == list(range(TOTAL)), (ranks, elements, align)


def test_buckets_are_neighbouring_whole_parameters_in_aligned_equal_shares() -> None:
    for ranks, elements, align in CUTS:
        layout = Layout(SHAPES, ranks, elements, align)
        assert [name for names in bucketed(list(SHAPES), layout) for name in names] == list(SHAPES)
        assert sum(bucket.numel for bucket in layout.buckets) == TOTAL
        assert len(layout.buckets) == 1 or elements > 0
        for number, bucket in enumerate(layout.buckets):
            assert bucket.share % align == 0
            assert bucket.share * ranks >= bucket.numel > (bucket.share - align) * ranks
            assert bucket.numel >= elements or number == len(layout.buckets) - 1
            assert all(layout.runs(rank)[number].numel <= bucket.share for rank in range(ranks))


def round_trip(world: World, elements: int, align: int) -> dict[str, Any]:
    """cut -> gathered, in several types; sums; what stands in the slice."""
    part, given = Slice(Layout(SHAPES, world.size, elements, align), world), whole()
    own = part.cut(given)
    assert own.shape == (part.numel,)
    assert torch.equal(own, part.indices().float())
    for tensor in (own, own.long(), own.bfloat16(), own % 3 == 0, own.double() / 7):
        back = part.gathered(tensor)
        wanted = {n: t.to(tensor.dtype) for n, t in given.items()}
        if tensor.dtype == torch.bool:
            wanted = {n: t % 3 == 0 for n, t in given.items()}
        elif tensor.dtype == torch.float64:
            wanted = {n: t.double() / 7 for n, t in given.items()}
        assert list(back) == list(given)
        assert all(back[n].dtype == tensor.dtype and torch.equal(back[n], wanted[n]) for n in given)
    assert torch.equal(torch.cat([own[s.start : s.start + s.numel] for s in part.segments] or [own]), own)
    viewed = torch.cat([v for _, v in part.views(own)] or [own])
    assert torch.equal(viewed, own)
    kept = part.sum(own % 3 == 0)
    assert kept.dtype == torch.int64
    return {
        "numel": part.numel, "kept": int(kept), "sum": float(part.sum(own)),
        "layers": part.layer_sums(own).tolist(), "kept layers": part.layer_sums(own % 3 == 0).tolist(),
    }  # fmt: skip


@pytest.mark.parametrize(("ranks", "elements", "align"), [(1, 0, 1), (2, 40, 2), (3, 1, 1), (4, 100, 16)])
def test_what_is_cut_is_gathered_again_and_sums_are_over_all_ranks(ranks: int, elements: int, align: int) -> None:
    results = run_distributed(round_trip, ranks, elements, align)
    given = whole()
    assert sum(r.pop("numel") for r in results) == TOTAL
    for result in results:
        assert result == {
            "kept": sum(int((t % 3 == 0).sum()) for t in given.values()),
            "sum": TOTAL * (TOTAL - 1) / 2,
            "layers": [float(t.double().sum()) for t in given.values()],
            "kept layers": [int((t % 3 == 0).sum()) for t in given.values()],
        }


def test_sums_are_exact_where_float32_would_have_lost_the_small_numbers() -> None:
    part = Slice.even({"w": torch.zeros(40_000)}, single())
    values = torch.full((40_000,), 2.0**24)
    values[1:] = 1.0
    assert float(part.sum(values)) == 2**24 + 39_999
    assert part.layer_sums(values).tolist() == [2**24 + 39_999]


def summed(world: World) -> Tensor:
    part = Slice.even(whole(), world)
    own = part.summed([t * (world.rank + 1) for t in whole().values()])
    assert torch.equal(own, part.indices().float() * sum(range(1, world.size + 1)))
    return own


SPANS = {"layers": Spans.layers, "channels": Spans.channels, "pieces": lambda part: Spans(part, [3, 1, 1, 1, 1, 11])}


def values_of_spans() -> dict[str, Tensor]:
    """Values of all sizes, and a layer of zeros."""
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(s, generator=generator) * 10.0 ** (3 * i) for i, (n, s) in enumerate(SHAPES.items())}
    return values | {"bias": torch.zeros(1)}


def sums_of_spans(world: World, elements: int, kind: str) -> tuple[list[float], list[float], list[int]]:
    part = Slice(Layout(SHAPES, world.size, elements, 2), world)
    spans, own = SPANS[kind](part), part.cut(values_of_spans())
    numbers = torch.cat([t.reshape(-1) for t in part.gathered(spans.numbers()).values()])
    factors = torch.arange(spans.count) + 0.5
    assert torch.equal(spans.multiply_(own.clone(), factors), own * spans.spread(factors))
    return spans.sums(own).tolist(), spans.sums(own, squared=True).tolist(), numbers.tolist()


@pytest.mark.parametrize("kind", SPANS)
@pytest.mark.parametrize("chunk", [1 << 18, 5])
def test_sums_of_spans_are_right_and_the_same_bits_on_any_ranks(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNKS, "cpu", chunk)
    sums, squares, numbers = sums_of_spans(World(0, 1, torch.device("cpu")), 0, kind)
    flat = torch.cat([t.reshape(-1) for t in values_of_spans().values()]).double()
    for span in range(max(numbers) + 1):
        own = flat[torch.tensor(numbers) == span]
        assert sums[span] == pytest.approx(float(own.sum()), abs=float(own.abs().sum()) * 1e-9)
        assert squares[span] == pytest.approx(float(own.square().sum()), rel=1e-9)
    assert {"layers": 6, "channels": 26, "pieces": 110}[kind] == len(sums)
    for ranks, elements in ((2, 0), (3, 40)):
        assert run_distributed(sums_of_spans, ranks, elements, kind) == [(sums, squares, numbers)] * ranks


def test_a_span_with_a_value_that_is_not_finite_has_no_sum() -> None:
    part = Slice(Layout(SHAPES, 1), single())
    values = values_of_spans()
    values["wide"][2, 3], values["conv"][0] = torch.nan, torch.inf
    finite = Spans.layers(part).sums(part.cut(values)).isfinite().tolist()
    assert finite == [name not in ("wide", "conv") for name in SHAPES]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_slice_of_the_sum_over_ranks(ranks: int) -> None:
    assert sum(len(own) for own in run_distributed(summed, ranks)) == TOTAL


def parts_of(step: int, total: int = 8, numel: int = 1001) -> list[Tensor]:
    """Numbers of very different sizes: their float32 sum depends on its order."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(total, numel, generator=generator) * 10 ** (6 * torch.rand(total, numel, generator=generator))
    return list(rows.unbind())


def by_hand(rows: list[Tensor]) -> Tensor:
    """((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))."""
    if len(rows) == 1:
        return rows[0].clone()
    half = 1 << (len(rows) - 1).bit_length() - 1
    return by_hand(rows[:half]) + by_hand(rows[half:])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 13])
def test_a_tree_sum_adds_neighbours_first(count: int) -> None:
    rows = parts_of(0, count)
    wanted = by_hand(rows)
    assert torch.equal(tree_sum([r.clone() for r in rows]), wanted)
    exact = torch.stack(rows).double().sum(0)
    torch.testing.assert_close(wanted.double(), exact, rtol=1e-5, atol=2.0)


def test_the_order_of_the_parts_matters_to_the_bits() -> None:
    rows = parts_of(0)
    assert not torch.equal(by_hand(rows), by_hand(rows[1:] + rows[:1])), "the other tests could not fail"
    assert not torch.equal(by_hand(rows), torch.stack(rows).sum(0))


def exchanged(world: World, order: list[int], most: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the sum of 8 parts, and the all-reduced one; rank order[i] has the i-th parts."""
    tree.MOST = most
    place, count = order.index(world.rank), 8 // world.size
    local = tree_sum(parts_of(1)[place * count : (place + 1) * count])
    everything = tree_all_reduce(world, local.clone(), order)
    padded = torch.zeros(-(-1001 // world.size) * world.size)
    padded[:1001] = local
    own = Exchange(world, padded, order).wait() if world.size > 1 else padded
    return own, everything


@pytest.mark.parametrize("order", [[0], [0, 1], [1, 0], [0, 1, 2, 3], [0, 2, 1, 3]])
def test_ranks_make_the_same_sum_of_the_same_parts_bit_for_bit(order: list[int]) -> None:
    results = run_distributed(exchanged, len(order), order, 64)
    wanted = by_hand(parts_of(1))
    assert torch.equal(torch.cat([own for own, _ in results])[:1001], wanted)
    assert all(torch.equal(everything, wanted) for _, everything in results)


def test_above_most_ranks_the_sums_agree_to_rounding_and_are_equal_on_all_ranks() -> None:
    results = run_distributed(exchanged, 4, [0, 2, 1, 3], 3)
    wanted = by_hand(parts_of(1))
    torch.testing.assert_close(torch.cat([own for own, _ in results])[:1001], wanted, rtol=1e-5, atol=2.0)
    for _, everything in results:
        assert torch.equal(everything, results[0][1])
        torch.testing.assert_close(everything, wanted, rtol=1e-5, atol=2.0)


BUCKETS = [[5, 3], [7], [2, 2, 4]]
"""Numels of the parameters in three buckets."""


def gradients(part: int, without: set[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """The gradients of one part of the batch, by (bucket, position)."""
    generator = torch.Generator().manual_seed(part)
    sizes = {(b, p): n for b, numels in enumerate(BUCKETS) for p, n in enumerate(numels)}
    drawn = {k: torch.randn(n, generator=generator) * 10 ** (3 * torch.rand(n, generator=generator))
             for k, n in sizes.items()}  # fmt: skip
    return {k: g for k, g in drawn.items() if k not in without}


def expected(total: int, without: set[tuple[int, int]], step: int = 0) -> list[Tensor]:
    """The sum of each bucket over all parts, in the tree's order."""
    buckets = []
    for bucket, numels in enumerate(BUCKETS):
        rows = []
        for part in range(total):
            found = gradients(100 * step + part, without)
            rows.append(torch.cat([found.get((bucket, p), torch.zeros(n)) for p, n in enumerate(numels)]))
        buckets.append(by_hand(rows))
    return buckets


def reduced(world: World, microbatches: int, without: set[tuple[int, int]]) -> list[list[Tensor]]:
    """This rank's part of every bucket after each of two steps, whose gradients come in another order on each rank."""
    reducer = BucketReducer(world, range(world.size), several=microbatches > 1)
    for numels in BUCKETS:
        reducer.add_bucket(numels, -(-sum(numels) // world.size), torch.float32)
    reducer.set_leaving([2, 0, 1])
    results = []
    for step in range(2):
        for number in range(microbatches):
            sending = number == microbatches - 1
            found = list(gradients(100 * step + world.rank * microbatches + number, without).items())
            turn = (world.rank + number) % len(found)
            for (bucket, position), gradient in found[turn:] + found[:turn]:
                reducer.add(bucket, position, gradient, sending=sending)
            reducer.end_backward(sending=sending)
        results.append([reducer.result(b).clone() for b in range(len(BUCKETS))])
        reducer.clear()
    return results


Case = tuple[int, set[tuple[int, int]]]
SOME = {(0, 1), (1, 0)}
"""A parameter of a bucket, and the only parameter of another, that get no gradient."""


def all_reduced(world: World, cases: list[Case]) -> list[list[list[Tensor]]]:
    return [reduced(world, *case) for case in cases]


def check(ranks: int, cases: list[Case], *, exact: bool) -> None:
    """Run the cases and compare what the ranks hold, put together, with the sum over all parts."""
    everyone = run_distributed(all_reduced, ranks, cases) if ranks > 1 else [all_reduced(single(), cases)]
    for number, (microbatches, without) in enumerate(cases):
        for step in range(2):
            for bucket, wanted in enumerate(expected(ranks * microbatches, without, step)):
                found = torch.cat([rank[number][step][bucket] for rank in everyone])
                assert not found[len(wanted) :].any(), "padding is not zero"
                if exact:
                    assert torch.equal(found[: len(wanted)], wanted), (ranks, cases[number], step, bucket)
                else:
                    torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-5, atol=1e-3)


def test_one_rank_adds_its_microbatches_in_the_trees_order() -> None:
    check(1, [(count, without) for count in (1, 2, 3, 4, 5) for without in (set(), SOME)], exact=True)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, (1, 2, 4)), (4, (1, 2))])
def test_ranks_whose_gradients_come_in_another_order_get_their_parts_of_the_trees_sum(
    ranks: int, microbatches: tuple[int, ...]
) -> None:
    check(ranks, [(count, without) for count in microbatches for without in (set(), SOME)], exact=True)


def test_numbers_of_microbatches_that_are_no_power_of_two_give_the_same_sums_to_rounding() -> None:
    check(2, [(3, set()), (5, SOME)], exact=False)


def halved(world: World, microbatches: int) -> tuple[Tensor, torch.dtype]:
    """A bucket that travels as bfloat16: its result, and the type of the buffer it was summed in."""
    reducer = BucketReducer(world, range(world.size), several=microbatches > 1)
    reducer.add_bucket([600], 600 // world.size, torch.bfloat16)
    reducer.set_leaving([0])
    rows = parts_of(5, world.size * microbatches, 600)
    dtype = torch.bfloat16
    for number, row in enumerate(rows[world.rank * microbatches :][:microbatches]):
        reducer.add(0, 0, row.bfloat16(), sending=number == microbatches - 1)
        flat = reducer._buckets[0].flat
        dtype = flat.dtype if flat is not None else dtype
        reducer.end_backward(sending=number == microbatches - 1)
    return reducer.result(0), dtype


def test_bfloat16_gradients_of_several_microbatches_are_added_in_float32() -> None:
    (result, dtype), _ = run_distributed(halved, 2, 4)
    assert result.dtype == dtype == torch.float32
    rows = [row.bfloat16().float() for row in parts_of(5, 8, 600)]
    first, second = by_hand(rows[:4]).bfloat16().float(), by_hand(rows[4:]).bfloat16().float()
    assert torch.equal(result, (first + second)[:300])


def elements_sent(world: World, microbatches: int) -> int:
    """What the exchanges of two steps carry."""
    sent = 0
    real = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, **settings: Any) -> Any:
        nonlocal sent
        sent += given.numel()
        return real(output, given, **settings)

    dist.all_to_all_single = counting
    reduced(world, microbatches, set())
    return sent


def test_several_microbatches_are_sent_once() -> None:
    padded = sum(-(-sum(numels) // 2) * 2 for numels in BUCKETS)
    assert run_distributed(elements_sent, 2, 3) == [2 * padded, 2 * padded]
