"""Does quasi-random order read whole pages, every sample once, alike on any number of ranks and after a resume?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.loading import order
from ghostmask.data_pipelines.loading.loader import BetonLoader
from ghostmask.data_pipelines.loading.quasi_random import quasi_random
from ghostmask.data_pipelines.loading.readahead import BATCHES_EARLY, schedule
from ghostmask.data_pipelines.open import open_dataset, prepare
from ghostmask.engine.data import Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import World

# As FFCV's writers leave it: pages of unequal numbers of samples, in an order of their own; some numbers are unused.
SIZES = np.random.default_rng(0).integers(5, 30, 60)
PAGES = np.random.default_rng(1).permuted(np.repeat(np.arange(60) * 2 + 3, SIZES).reshape(-1))
BATCH, WINDOW = 48, 12


def _order(epoch: int = 0, *, seed: int = 0, parts: int = 4, window: int = WINDOW) -> np.ndarray:
    return quasi_random(seed, epoch, PAGES, batch_size=BATCH, num_parts=parts, window_pages=window)


def _stretch(samples: np.ndarray, part: int, parts: int = 4) -> np.ndarray:
    """What part `part` gets in an epoch."""
    return samples[part::parts]


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_every_sample_comes_once_but_for_the_last_incomplete_batch(parts: int) -> None:
    samples = _order(parts=parts)
    assert len(samples) == len(set(samples.tolist())) == len(PAGES) // BATCH * BATCH
    assert samples.min() >= 0
    assert samples.max() < len(PAGES)


def test_other_samples_are_left_out_in_other_epochs() -> None:
    left = {frozenset(set(range(len(PAGES))) - set(_order(epoch).tolist())) for epoch in range(5)}
    assert len(left) == 5


def test_orders_are_functions_of_seed_and_epoch() -> None:
    np.testing.assert_array_equal(_order(3, seed=5), _order(3, seed=5))
    assert len({_order(epoch, seed=seed).tobytes() for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_each_part_has_pages_of_its_own_but_where_two_meet(parts: int) -> None:
    owned = [set(PAGES[_stretch(_order(parts=parts), p, parts)].tolist()) for p in range(parts)]
    shared = [len(a & b) for i, a in enumerate(owned) for b in owned[:i]]
    assert max(shared) <= 1
    assert sum(shared) <= parts - 1


@pytest.mark.parametrize(("parts", "window"), [(1, 12), (4, 12), (4, 1), (2, 1000)])
def test_a_part_reads_a_window_of_pages_after_the_other(parts: int, window: int) -> None:
    """Each page is in use for one stretch of time, in which no more than a window's pages are."""
    most = max(1, window // parts)
    for part in range(parts):
        pages = PAGES[_stretch(_order(parts=parts, window=window), part, parts)]
        first, last = {}, {}
        for at, page in enumerate(pages.tolist()):
            first.setdefault(page, at)
            last[page] = at
        in_use = [sum(first[p] <= at <= last[p] for p in first) for at in range(len(pages))]
        assert max(in_use) <= most
        assert len(first) <= most or np.mean(in_use) > most / 3


def test_samples_of_a_window_are_mixed() -> None:
    pages = PAGES[_stretch(_order(parts=1, window=20), 0, 1)]
    assert len(set(pages[:60].tolist())) > 15  # of 20: in whole pages it would be 4
    assert (np.diff(pages) != 0).mean() > 0.9


def test_every_page_may_come_first() -> None:
    first = {page for epoch in range(60) for page in PAGES[_order(epoch)[:BATCH]].tolist()}
    assert first == set(PAGES.tolist())


def test_wishes_come_in_time_and_evenly_and_pages_go_after_their_last_image() -> None:
    pages = PAGES[_stretch(_order(), 1)]
    each = BATCH // 4
    ask, drop = schedule(pages, each)
    batches = pages.reshape(-1, each)
    assert sorted(p for asked in ask.values() for p in asked) == sorted(set(pages.tolist()))
    assert sorted(p for dropped in drop.values() for p in dropped) == sorted(set(pages.tolist()))
    for asked, names in ask.items():
        for page in names:
            first, last = np.flatnonzero((batches == page).any(1))[[0, -1]]
            assert asked <= max(0, first - BATCHES_EARLY)
            assert page in drop[last + 1]
    after_the_start = [len(names) for batch, names in ask.items() if batch]
    assert max(after_the_start) <= 2
    assert len(ask[0]) <= 2 * WINDOW / 4 + 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images of 64 x 64 x 3 bytes: 3 pages of 2 MiB."""
    root = tmp_path_factory.mktemp("data")
    prepare(_config(root), progress=False)
    return root


def _config(root: Path, **settings: Any) -> DataConfig:
    base = {"dataset": "synthetic", "num_train": 400, "num_eval": 8, "image_size": 64, "batch_size": 16}
    return DataConfig(
        root=str(root), **{**base, "order": "quasi_random", "window_pages": 1, "num_workers": 1, **settings}
    )


def _open(root: Path, rank: int = 0, size: int = 1, **settings: Any) -> Any:
    parts = Parts(4, rank * (4 // size), 4 // size)
    return open_dataset(_config(root, **settings), 3, World(rank, size, torch.device("cpu")), parts)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_get_what_one_rank_gets_and_go_on_in_the_middle(root: Path, size: int) -> None:
    whole = list(_open(root).train(1))
    assert len(whole) == 25
    for rank in range(size):
        share = list(_open(root, rank, size).train(1, first_step=7))
        assert len(share) == 18
        for batch, own in zip(whole[7:], share, strict=True):
            each, count = 4, 4 // size
            assert torch.equal(batch.images[rank * count * each : (rank + 1) * count * each], own.images)
            assert torch.equal(batch.labels[rank * count * each : (rank + 1) * count * each], own.labels)


def test_images_are_those_of_random_order_in_another_order(root: Path) -> None:
    def seen(**settings: Any) -> set[bytes]:
        return {image.numpy().tobytes() for batch in _open(root, **settings).train(2) for image in batch.images}

    assert seen() == seen(order="random")
    assert len(seen()) == 400


def test_a_rank_reads_pages_of_its_parts_only(root: Path) -> None:
    pipeline = _open(root, 3, 4)
    pages = pipeline._loaders["train"].pages
    assert len(set(pages.tolist())) == 3
    samples = quasi_random(3, 0, pages, batch_size=16, num_parts=4, window_pages=1)
    rows = order.train_rows(3, 0, num_train=400, batch_size=16, parts=Parts(4, 3, 1), samples=samples)
    assert len(set(pages[rows[:, 0].astype(np.int64)].tolist())) <= 2


def test_where_the_pages_lie_is_part_of_what_the_data_are(root: Path) -> None:
    by_page, random = _open(root).identity, _open(root, order="random").identity
    assert by_page.items() > random.items()
    assert set(by_page) - set(random) == {"pages of the training file"}


def test_pages_leave_the_page_cache_behind_the_epoch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real FFCV on a real file: every page is asked for and let go of, and the pixels do not change."""
    wishes: list[tuple[int, int]] = []
    from ghostmask.data_pipelines.loading import readahead

    def noted(_: int, start: int, length: int, advice: int) -> None:
        wishes.append((start // (1 << 21), advice))

    monkeypatch.setattr(readahead.os, "posix_fadvise", noted)
    pipeline = _open(root)
    list(pipeline.train(0))
    pages = set(pipeline._loaders["train"].pages.tolist())
    assert {page for page, advice in wishes if advice == readahead.os.POSIX_FADV_WILLNEED} == pages
    assert {page for page, advice in wishes if advice == readahead.os.POSIX_FADV_DONTNEED} <= pages


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"order": "shuffled"}, "data.order = 'shuffled'"), ({"window_pages": 0}, "data.window_pages = 0: give a number")],
)
def test_odd_settings_are_refused(root: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _config(root, **settings)


def test_the_loader_knows_the_page_of_every_sample(root: Path) -> None:
    pipeline = _open(root)
    loader: BetonLoader = pipeline._loaders["train"]
    counts = np.unique(loader.pages, return_counts=True)[1]
    assert counts.sum() == 400
    assert counts.max() <= (1 << 21) // (64 * 64 * 3)
