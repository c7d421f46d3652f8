"""Does every rank, resumed or not, get the batches that engine.data.DataPipeline promises? Real FFCV throughout."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.open import check_batch, open_dataset, prepare
from ghostmask.data_pipelines.source import Images
from ghostmask.data_pipelines.sources.synthetic import SyntheticImages
from ghostmask.engine.data import DataPipeline, Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import World

NUM_TRAIN, NUM_EVAL, BATCH = 100, 31, 12
STEPS = NUM_TRAIN // BATCH

Open = Callable[..., DataPipeline]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def _config(root: Path, **settings: object) -> DataConfig:
    base = {"dataset": "synthetic", "num_train": NUM_TRAIN, "num_eval": NUM_EVAL, "image_size": 16, "num_workers": 1}
    return DataConfig(root=str(root), **{"batch_size": BATCH, **base, **settings})  # type: ignore[arg-type]


@pytest.fixture
def open_rank(root: Path) -> Iterator[Open]:
    opened = []

    def open_one(
        rank: int = 0, size: int = 1, seed: int = 0, total: int | None = None, **settings: object
    ) -> DataPipeline:
        """Rank `rank` of `size`; total: parts of a global batch, of which it has as many as the others; None = size."""
        config = _config(root, **settings)
        prepare(config, progress=False)
        total = total or size
        parts = Parts(total, rank * (total // size), total // size)
        opened.append(open_dataset(config, seed, World(rank, size, torch.device("cpu")), parts))
        return opened[-1]

    yield open_one
    for pipeline in opened:
        pipeline.close()


def _gray_levels(images: Tensor) -> np.ndarray:
    """Undo the normalisation of the synthetic dataset: (n, H, W, 3) uint8."""
    return ((images * 0.173 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _sorted_bytes(images: Images) -> list[bytes]:
    return sorted(images[i][0].tobytes() for i in range(len(images)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_evaluation_image_is_seen_once_by_one_rank(open_rank: Open, size: int) -> None:
    batches = [b for rank in range(size) for b in open_rank(rank, size).evaluate()]
    seen = sorted(image.tobytes() for batch in batches for image in _gray_levels(batch.images))
    source = SyntheticImages(False, NUM_EVAL, 10, 16)
    assert seen == _sorted_bytes(source)
    labels = np.bincount(torch.cat([b.labels for b in batches]).numpy(), minlength=10)
    np.testing.assert_array_equal(labels, np.bincount(np.arange(NUM_EVAL) % 10))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_training_image_is_seen_twice_in_an_epoch(open_rank: Open, size: int) -> None:
    batches = [b for rank in range(size) for b in open_rank(rank, size, augment=False).train(4)]
    seen = [image.tobytes() for batch in batches for image in _gray_levels(batch.images)]
    assert len(seen) == len(set(seen)) == STEPS * BATCH
    assert set(seen) <= set(_sorted_bytes(SyntheticImages(True, NUM_TRAIN, 10, 16)))


def test_images_keep_their_labels(open_rank: Open) -> None:
    source = SyntheticImages(True, NUM_TRAIN, 10, 16)
    label_of = {source[i][0].tobytes(): source[i][1] for i in range(NUM_TRAIN)}
    for batch in open_rank(augment=False).train(0):
        assert [label_of[image.tobytes()] for image in _gray_levels(batch.images)] == batch.labels.tolist()


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_four_parts_have_the_same_pixels_on_one_two_and_four_ranks(
    open_rank: Open, size: int, num_workers: int
) -> None:
    whole = list(open_rank(seed=3, num_workers=1).train(1, first_step=2))
    ranks = [open_rank(rank, size, seed=3, total=4, num_workers=num_workers) for rank in range(size)]
    assert [rank.parts for rank in ranks] == [Parts(4, r * 4 // size, 4 // size) for r in range(size)]
    shares = [list(rank.train(1, first_step=2)) for rank in ranks]
    assert {len(share) for share in shares} == {STEPS - 2}
    for step, batch in enumerate(whole):
        together = [
            tensor for share in shares for tensor in zip(*(t.chunk(4 // size) for t in share[step]), strict=True)
        ]
        assert len(together) == 4
        for part, (images, labels) in enumerate(together):
            assert torch.equal(images, batch.images[part::4])
            assert torch.equal(labels, batch.labels[part::4])


@pytest.mark.parametrize("size", [2, 3])
def test_pixels_and_order_do_not_depend_on_the_number_of_ranks(open_rank: Open, size: int) -> None:
    whole = list(open_rank(seed=3).train(1))
    for rank in range(size):
        shares = list(open_rank(rank, size, seed=3).train(1))
        assert len(shares) == STEPS
        for batch, share in zip(whole, shares, strict=True):
            assert torch.equal(batch.images[rank::size], share.images)
            assert torch.equal(batch.labels[rank::size], share.labels)


def test_a_resumed_epoch_goes_on_with_identical_pixels(open_rank: Open) -> None:
    whole = list(open_rank(seed=3).train(5))
    fresh = open_rank(seed=3)
    list(fresh.evaluate())
    rest = list(fresh.train(5, first_step=3))
    assert len(rest) == STEPS - 3
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[3:], rest, strict=True))
    assert list(fresh.train(5, first_step=STEPS)) == []


def test_epochs_differ_in_order_and_in_augmentation(open_rank: Open) -> None:
    pipeline, plain = open_rank(), open_rank(augment=False)
    first, second = (torch.cat([b.labels for b in pipeline.train(e)]) for e in (0, 1))
    assert not torch.equal(first, second)
    changed = [(a.images != b.images).flatten(1).any(1) for a, b in zip(pipeline.train(0), plain.train(0), strict=True)]
    assert torch.cat(changed).float().mean() > 0.9  # 1 in 25 is shifted by nothing
    other_seed = open_rank(seed=1)
    assert not torch.equal(first, torch.cat([b.labels for b in other_seed.train(0)]))


def test_batches_have_the_promised_form(open_rank: Open) -> None:
    pipeline = open_rank(1, 2)
    assert (pipeline.num_train, pipeline.num_eval, pipeline.batch_size) == (NUM_TRAIN, NUM_EVAL, BATCH)
    assert (pipeline.num_classes, pipeline.image_shape, pipeline.steps_per_epoch) == (10, (3, 16, 16), STEPS)
    batch = next(pipeline.train(0))
    assert batch.images.shape == (BATCH // 2, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64


def test_a_batch_stays_what_it_was_when_the_next_ones_are_read(open_rank: Open) -> None:
    kept, copies = [], []
    for batch in open_rank().train(0):
        kept.append(batch.images)
        copies.append(batch.images.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_an_epoch_left_early_ends_its_thread_and_the_next_one_works(open_rank: Open) -> None:
    pipeline = open_rank(batch_size=1)
    before = threading.active_count()
    for _ in range(5):
        epoch = pipeline.train(0)
        next(epoch)
        assert threading.active_count() == before + 1
        epoch.close()
        assert threading.active_count() == before
    unfinished = pipeline.train(1)
    next(unfinished)
    assert len(list(pipeline.evaluate())) == NUM_EVAL  # while a training epoch is open
    pipeline.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("order", ["random", "quasi_random"])
def test_fifty_epochs_left_early_leak_neither_threads_nor_files_nor_memory(order: str, open_rank: Open) -> None:
    """An epoch's buffers are 6 MB: one in ten of them kept would be seen."""
    pipeline = open_rank(image_size=64, num_train=400, batch_size=100, order=order)
    page_bytes = os.sysconf("SC_PAGE_SIZE")

    def held() -> tuple[int, int, int]:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page_bytes
        return threading.active_count(), len(os.listdir("/proc/self/fd")), resident

    seen = []
    for epoch in range(60):
        batches = pipeline.train(epoch)
        for _ in range(epoch % 3 + 1):
            next(batches)
        batches.close()
        seen.append(held())
    threads, files, resident = zip(*seen[10:], strict=True)
    assert len(set(threads)) == 1
    assert len(set(files)) == 1
    assert max(resident[-10:]) - max(resident[:10]) < 25e6


def test_loading_leaves_numbas_types_alone(open_rank: Open) -> None:
    import numba

    line = numba.uint8[::1]
    list(open_rank().train(0))
    assert line.mutable
    assert numba.uint8[::1] == line


def test_loading_leaves_torchs_threads_alone(open_rank: Open) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pipeline = open_rank()
        list(pipeline.train(0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch_size", [10, 11])
def test_a_batch_that_cannot_be_cut_into_parts_names_the_nearest(batch_size: int, open_rank: Open) -> None:
    said = rf"data\.batch_size = {batch_size}: give a multiple of train\.replicas = 3, such as 9 or 12"
    with pytest.raises(InputError, match=said):
        open_rank(total=3, batch_size=batch_size)


def test_a_batch_smaller_than_its_parts_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"multiple of train\.replicas = 8, such as 8$"):
        check_batch(_config(tmp_path, batch_size=5), 8)


def test_a_batch_larger_than_the_data_is_an_input_error(open_rank: Open) -> None:
    with pytest.raises(InputError, match=r"data\.batch_size = 101: give at most the 100 training images"):
        open_rank(batch_size=101)


def test_more_ranks_than_evaluation_images_is_an_input_error(open_rank: Open) -> None:
    with pytest.raises(InputError, match="32 ranks are more than its 31 evaluation images"):
        open_rank(0, 32, batch_size=32)
