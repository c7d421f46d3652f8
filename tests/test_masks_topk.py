"""Does the global top-k keep exactly the largest scores, for any ties, signs and sizes?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.kernels.compiled import load_kernels
from ghostmask.masks.scoring import topk
from ghostmask.masks.scoring.topk import kept_count, seeded_order, topk_shard


def by_sorting(scores: list[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """The same masks from a stable sort in float64."""
    flat = torch.cat([score.reshape(-1) for score in scores]).double().numpy()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.from_numpy(np.argsort(-flat, kind="stable")[:kept].copy())] = True
    return [part.view(score.shape) for part, score in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


def topk_masks(scores: list[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """The masks of whole tensors on one rank, ties to the first."""
    wide = any(score.dtype == torch.float64 for score in scores)
    flat = torch.cat([s.reshape(-1).to(torch.float64 if wide else torch.float32) for s in scores])
    mask = topk_shard(flat, kept, single())
    return [part.view(s.shape) for part, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


KINDS = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "coarse": lambda shape, g: torch.randint(-3, 4, shape, generator=g).float(),
    "two values": lambda shape, g: torch.randint(0, 2, shape, generator=g).float(),
    "constant": lambda shape, g: torch.full(shape, 0.3),
    "neighbours": lambda shape, g: (torch.randint(0, 9, shape, generator=g) + 0x3F000000).int().view(torch.float32),
    "wide": lambda shape, g: torch.randn(shape, generator=g) * 10 ** (60 * torch.rand(shape, generator=g) - 30),
    "tiny": lambda shape, g: torch.randn(shape, generator=g) * 1e-44,
}


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How scores are counted, in several chunks or by three threads even in tensors of a few hundred elements."""
    monkeypatch.setattr(topk, "CHUNK", 37)
    monkeypatch.setattr(topk, "SMALLEST_RANGE", 37)
    if request.param == "torch":
        monkeypatch.setattr(topk, "load_kernels", lambda name: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_equal_those_of_a_stable_sort(kind: str, path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5, 3, 3), (1,), (64,), (10, 17), (0, 3)]
    for trial in range(6):
        scores = [KINDS[kind](shape, generator) for shape in shapes]
        total = sum(score.numel() for score in scores)
        kept = [0, 1, total, total - 1, total // 20, total // 2][trial]
        masks = topk_masks(scores, kept)
        assert sum(int(mask.sum()) for mask in masks) == kept
        assert equal(masks, by_sorting(scores, kept))


def shard_masks(world: World, cases: list[tuple[list[torch.Tensor], int, list[int]]]) -> list[torch.Tensor]:
    """This rank's part of the mask of each case: (scores, kept, where the ranks' shards begin)."""
    flat = [torch.cat([s.reshape(-1) for s in scores]) for scores, _, _ in cases]
    return [topk_shard(f.tensor_split(cuts)[world.rank], k, world) for f, (_, k, cuts) in zip(flat, cases, strict=True)]


def test_shards_of_three_ranks_give_the_mask_of_one_rank_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(2)
    cases = []
    for draw in KINDS.values():
        scores = [draw(shape, generator) for shape in [(7, 5, 3, 3), (1,), (64,), (10, 17)]]
        for kept, cuts in ((1, [3, 400]), (275, [0, 130]), (549, [200, 550])):
            cases.append(([s.double() for s in scores] if kept == 275 else scores, kept, cuts))
    ranks = run_distributed(shard_masks, 3, cases)
    for number, (scores, kept, _) in enumerate(cases):
        expected = torch.cat([mask.reshape(-1) for mask in by_sorting(scores, kept)])
        assert torch.equal(torch.cat([rank[number] for rank in ranks]), expected)


def test_float64_scores_are_told_apart_where_float32_could_not(path: str) -> None:
    steps = torch.arange(500, dtype=torch.float64)[torch.randperm(500, generator=torch.Generator().manual_seed(3))]
    scores = [1.0 + steps * 1e-14, 1e200 * steps, -1e-200 * steps, -steps]
    for kept in (1, 250, 700, 1200, 1600, 1999):
        assert equal(topk_masks(scores, kept), by_sorting(scores, kept))


def test_ties_go_to_the_first_tensor_and_the_first_position() -> None:
    masks = topk_masks([torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 1.0], [1.0, 0.0]])], 4)
    assert masks[0].tolist() == [True, True]
    assert masks[1].tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_zeros_tie_and_infinities_are_scores(dtype: torch.dtype, path: str) -> None:
    scores = [torch.tensor([-0.0, 0.0, -1.0, float("inf"), float("-inf")], dtype=dtype)]
    assert topk_masks(scores, 2)[0].tolist() == [True, False, False, True, False]
    assert topk_masks(scores, 4)[0].tolist() == [True, True, True, True, False]


def tied_masks(world: World, cuts: list[int]) -> torch.Tensor:
    """This rank's part of 50 of 200 equal scores, told apart by a hash of their index."""
    indices = torch.arange(200).tensor_split(cuts)[world.rank]
    return topk_shard(torch.ones(len(indices)), 50, world, lambda tied: seeded_order(indices[tied], 7))


def test_equal_scores_are_told_apart_by_a_seeded_hash_however_they_are_cut() -> None:
    whole = tied_masks(single(), [200])
    assert int(whole.sum()) == 50
    assert 5 <= int(whole[:100].sum()) <= 45, "the first were preferred"
    for cuts in ([3, 120], [0, 199]):
        assert torch.equal(torch.cat(run_distributed(tied_masks, 3, cuts)), whole)
    other = topk_shard(torch.ones(200), 50, single(), lambda tied: seeded_order(tied, 8))
    assert not torch.equal(other, whole), "the seed has no say"


def test_a_hash_of_an_index_is_a_number_of_its_own() -> None:
    order = seeded_order(torch.arange(1_000_000), 0)
    assert len(order.unique()) == 1_000_000
    assert float(order.min()) >= 0
    assert float(order.max()) < 2**52


def test_a_nan_score_stops_the_run() -> None:
    with pytest.raises(RunStopped, match="1 of 3 scores are nan") as stopped:
        topk_shard(torch.tensor([1.0, float("nan"), 2.0]), 2, single())
    assert stopped.value.exit_code == EXIT_NON_FINITE


@pytest.mark.parametrize("kept", [-1, 5])
def test_a_count_out_of_range_is_refused(kept: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 4\]"):
        topk_masks([torch.ones(4)], kept)


def test_counting_is_compiled_here() -> None:
    assert load_kernels("ghostmask.masks.kernels.topk_cpu") is not None


def test_kept_count_rounds_and_keeps_at_least_one_weight() -> None:
    assert kept_count(0.1, 25_502_912) == 2_550_291
    assert kept_count(0.01, 1_855_584) == 18_556
    assert kept_count(1.0, 7) == 7
    assert kept_count(1e-9, 100) == 1
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        kept_count(0.0, 100)
