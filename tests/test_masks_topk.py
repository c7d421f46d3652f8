"""Does the global top-k keep exactly the largest scores, for any ties, signs, sizes and slices?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ghostmask.engine.compiled import kernels_on
from ghostmask.engine.errors import EXIT_NON_FINITE, InputError, RunStopped
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.scoring import radix
from ghostmask.masks.scoring.topk import Budget, empty_layers, hashed, kept_count, largest


def by_sorting(scores: Tensor, kept: int, seed: int = 0) -> Tensor:
    """The same mask by sorting in float64: of equal scores those with the largest hash stay."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    hashes = hashed(torch.arange(len(scores)), seed).numpy()
    order = np.lexsort((hashes, scores.double().numpy() + 0.0))
    mask[torch.from_numpy(order[len(order) - kept :].copy())] = True
    return mask


def keep(scores: Tensor, kept: int, among: Tensor | None = None) -> Tensor:
    """The `kept` largest of one vector on one rank."""
    part = Slice(Layout({"all": scores.shape}, 1), single())
    mask = largest(part, scores, Budget(kept / len(scores)), among)
    assert int(mask.sum()) == kept
    return mask


KINDS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "coarse": lambda n, g: torch.randint(-3, 4, (n,), generator=g).float(),
    "two values": lambda n, g: torch.randint(0, 2, (n,), generator=g).float(),
    "constant": lambda n, g: torch.full((n,), 0.3),
    "neighbours": lambda n, g: (torch.randint(0, 9, (n,), generator=g) + 0x3F000000).int().view(torch.float32),
    "wide": lambda n, g: torch.randn(n, generator=g) * 10 ** (60 * torch.rand(n, generator=g) - 30),
    "tiny": lambda n, g: torch.randn(n, generator=g) * 1e-44,
}


@pytest.fixture(params=["compiled", "torch", "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How scores are counted, in several chunks or by three threads even in tensors of a few hundred elements.

    device: as on one that nobody waits for, where CPU tensors stand for its own.
    """
    monkeypatch.setattr(radix, "CHUNK", 37)
    monkeypatch.setattr(radix, "SMALLEST_RANGE", 37)
    if request.param != "compiled":
        monkeypatch.setattr(radix, "kernels_on", lambda device, name: None)
    if request.param == "device":
        monkeypatch.setattr(radix, "on_host", lambda device: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_sorting(kind: str, path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for kept in (1, 550, 549, 27, 275):
        scores = KINDS[kind](550, generator)
        assert torch.equal(keep(scores, kept), by_sorting(scores, kept))


def test_float64_scores_are_told_apart_where_float32_could_not(path: str) -> None:
    steps = torch.arange(500, dtype=torch.float64)[torch.randperm(500, generator=torch.Generator().manual_seed(3))]
    scores = torch.cat([1.0 + steps * 1e-14, 1e200 * steps, -1e-200 * steps, -steps])
    for kept in (1, 250, 700, 1200, 1600, 1999):
        assert torch.equal(keep(scores, kept), by_sorting(scores, kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_zeros_tie_and_infinities_are_scores(dtype: torch.dtype, path: str) -> None:
    scores = torch.tensor([-0.0, 0.0, -1.0, float("inf"), float("-inf")] * 40, dtype=dtype)
    for kept in (20, 40, 60, 80, 120, 159, 160, 180, 199):
        assert torch.equal(keep(scores, kept), by_sorting(scores, kept))
    among = torch.arange(200) % 5 != 3
    assert torch.equal(keep(scores, 160, among), among), "what may not stay must lose against -inf"


def bad(world: World) -> str:
    scores = torch.tensor([1.0, float("nan")]) if world.rank else torch.ones(3)
    part = Slice(Layout({"all": torch.Size((5,))}, world.size), world)
    with pytest.raises(RunStopped, match="1 of 5 scores are nan") as stopped:
        largest(part, scores, Budget(0.4))
    assert stopped.value.exit_code == EXIT_NON_FINITE
    return str(stopped.value)


def test_a_nan_score_on_one_rank_stops_all() -> None:
    assert len(set(run_distributed(bad, 2))) == 1


def test_where_nobody_waits_a_nan_is_kept_so_that_the_loss_shows_it(path: str) -> None:
    scores = torch.randn(550, generator=torch.Generator().manual_seed(4))
    scores[[7, 300]] = torch.tensor([float("nan"), float("-nan")])
    part = Slice(Layout({"all": scores.shape}, 1), single())
    if path == "device":
        mask = largest(part, scores, Budget(0.1), wait=False)
        assert torch.equal(mask, by_sorting(scores.nan_to_num(torch.inf), 55))
    with pytest.raises(RunStopped, match="2 of 550 scores are nan"):
        largest(part, scores, Budget(0.1), wait=True)


def test_counting_is_compiled_here() -> None:
    assert kernels_on(torch.device("cpu"), radix.KERNELS) is not None


def test_kept_count_rounds_and_keeps_at_least_one_weight() -> None:
    assert kept_count(0.1, 25_502_912) == 2_550_291
    assert kept_count(0.01, 1_855_584) == 18_556
    assert kept_count(1.0, 7) == 7
    assert kept_count(1e-9, 100) == 1
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        kept_count(0.0, 100)


def test_the_order_of_ties_is_a_hash_of_index_and_seed() -> None:
    indices = torch.cat([torch.arange(200_000), torch.tensor([2**31 - 1, 2**31, 2**40])])
    first, second = hashed(indices, 1), hashed(indices, 2)
    assert len(first.unique()) == len(indices)
    assert torch.equal(first[77:99], hashed(indices[77:99], 1))
    for a, b in ((first, second), (first[:-1], first[1:]), (first, indices)):
        assert abs(float(torch.corrcoef(torch.stack([a[:200_000], b[:200_000]]).double())[0, 1])) < 0.01
    halves = (first[:200_000] >> torch.arange(64).unsqueeze(1)) & 1
    assert float((halves.double().mean(1) - 0.5).abs().max()) < 0.006, "a bit of the hash is not even"


SHAPES = {"a": torch.Size((10,)), "b": torch.Size((7, 5, 3)), "c": torch.Size((2,)), "d": torch.Size((40, 11))}
TOTAL = sum(s.numel() for s in SHAPES.values())


def scores_of(kind: str) -> dict[str, Tensor]:
    flat = KINDS[kind](TOTAL, torch.Generator().manual_seed(5))
    parts = flat.split([s.numel() for s in SHAPES.values()])
    return {name: part.view(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


BUDGETS = [
    Budget(0.1), Budget(0.37, seed=3), Budget(0.2, "layerwise", seed=1), Budget(0.1, min_per_layer=3, seed=2),
    Budget(1.0), Budget(1e-9), Budget(0.5, min_per_layer=60),
]  # fmt: skip
CUTS = [(0, 1), (50, 1), (1, 8)]


def largest_of(world: World) -> list[dict[str, Tensor]]:
    found = []
    for elements, align in CUTS[:1] if world.size == 1 else CUTS:
        part = Slice(Layout(SHAPES, world.size, elements, align), world)
        for kind in ("normal", "coarse", "constant"):
            scores = part.cut(scores_of(kind))
            for budget in BUDGETS:
                mask = largest(part, scores, budget)
                assert mask.shape == scores.shape
                found.append(part.gathered(mask))
            among = part.indices() % 2 == 0
            found += [part.gathered(largest(part, scores, budget, among=among)) for budget in BUDGETS[:2]]
            layerwise = Budget(0.2, "layerwise", seed=1)
            found += [part.gathered(largest(part, scores.double(), layerwise, among=among))]
    return found


def test_the_largest_are_the_same_weights_however_they_lie_in_slices() -> None:
    alone = largest_of(single())
    for ranks in (1, 3):
        for rank in run_distributed(largest_of, ranks):
            for start in range(0, len(rank), len(alone)):
                for number, (mask, wanted) in enumerate(zip(rank[start:], alone, strict=False)):
                    assert all(torch.equal(mask[n], wanted[n]) for n in SHAPES), number


@pytest.mark.parametrize("kind", ["normal", "coarse", "constant"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_exactly_as_many_stay_as_the_budget_says_and_they_are_the_largest(kind: str, budget: Budget) -> None:
    part = Slice(Layout(SHAPES, 1), single())
    scores = scores_of(kind)
    masks = part.gathered(largest(part, part.cut(scores), budget))
    counts = {n: int(m.sum()) for n, m in masks.items()}
    if budget.constraint == "layerwise":
        assert counts == {n: kept_count(budget.density, s.numel()) for n, s in SHAPES.items()}
        pools = [(scores[n][masks[n]], scores[n][~masks[n]]) for n in SHAPES]
    else:
        assert sum(counts.values()) == kept_count(budget.density, TOTAL)
        least = {n: min(budget.min_per_layer, s.numel()) for n, s in SHAPES.items()}
        assert all(counts[n] >= least[n] for n in SHAPES)
        # A layer at its minimum may have kept smaller scores than another one lost.
        free = [n for n in SHAPES if counts[n] > least[n]]
        pools = [
            (torch.cat([scores[n][masks[n]] for n in free]), torch.cat([scores[n][~masks[n]] for n in SHAPES]))
        ] if free else []  # fmt: skip
        pools += [(scores[n][masks[n]], scores[n][~masks[n]]) for n in SHAPES]
    for kept, lost in pools:
        assert not len(lost) or not len(kept) or float(kept.min()) >= float(lost.max())


def test_ties_go_by_the_seed_and_not_by_the_layer() -> None:
    part = Slice(Layout({"first": torch.Size((5000,)), "last": torch.Size((5000,))}, 1), single())
    masks = [part.gathered(largest(part, torch.ones(10_000), Budget(0.3, seed=seed))) for seed in (0, 0, 1)]
    for found in masks:
        assert abs(int(found["first"].sum()) - 1500) < 5 * (5000 * 0.3 * 0.7) ** 0.5
    assert torch.equal(masks[0]["first"], masks[1]["first"])
    both = int((masks[0]["first"] & masks[2]["first"]).sum())
    assert both < 600, "another seed chose the same weights"


def test_only_those_among_compete() -> None:
    part = Slice(Layout(SHAPES, 1), single())
    scores = part.cut(scores_of("normal"))
    among = part.indices() % 3 == 0
    mask = largest(part, scores, Budget(0.2), among=among)
    assert not bool((mask & ~among).any())
    assert torch.equal(mask, by_sorting(torch.where(among, scores, float("-inf")), kept_count(0.2, TOTAL)))


def test_a_minimum_above_the_budget_is_refused_and_empty_layers_are_found() -> None:
    part = Slice(Layout(SHAPES, 1), single())
    with pytest.raises(
        InputError, match=r"^mask\.min_per_layer = 50: 4 layers need 112 weights, mask\.density = 0\.1 "
    ):
        largest(part, torch.ones(TOTAL), Budget(0.1, min_per_layer=50))
    scores = part.cut({n: torch.full(s, float(i)) for i, (n, s) in enumerate(SHAPES.items())})
    assert empty_layers(part.gathered(largest(part, scores, Budget(0.1)))) == ["a", "b", "c"]
    assert empty_layers(part.gathered(largest(part, scores, Budget(0.1, min_per_layer=1)))) == []
