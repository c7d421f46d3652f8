"""Is the order of samples a function of (seed, epoch) that every rank and every resumed run agrees on?"""

from __future__ import annotations

import numpy as np
import pytest

from ghostmask.data_pipelines.loading import order
from ghostmask.engine.data import Parts


def test_order_and_words_never_change_between_versions() -> None:
    assert order.permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order.permutation(7, 3, 8).tolist() == [4, 2, 7, 3, 0, 6, 1, 5]
    assert [int(w) for w in order.sample_words(7, 3, np.arange(3))] == [
        17444748674658639022,
        9282042980304413237,
        11738385143980750071,
    ]


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(order.permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(o) == list(range(50)) for o in orders)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 6])
def test_part_p_of_every_global_batch_is_its_samples_p_p_plus_total_and_so_on(total: int) -> None:
    whole = order.train_rows(5, 2, num_train=100, batch_size=12, parts=Parts())
    assert len(whole) == 96
    for part in range(total):
        rows = order.train_rows(5, 2, num_train=100, batch_size=12, parts=Parts(total, part, 1))
        expected = whole.reshape(8, 12, 2)[:, part::total].reshape(-1, 2)
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_rank_gets_its_parts_of_a_batch_one_after_the_other(count: int) -> None:
    settings = {"num_train": 100, "batch_size": 12}
    alone = [order.train_rows(5, 2, parts=Parts(4, p, 1), **settings).reshape(8, 3, 2) for p in range(4)]
    for first in range(0, 4, count):
        rows = order.train_rows(5, 2, parts=Parts(4, first, count), **settings).reshape(8, count, 3, 2)
        for part in range(count):
            np.testing.assert_array_equal(rows[:, part], alone[first + part])


def test_starting_in_the_middle_continues_the_same_order() -> None:
    parts = Parts(4, 1, 2)
    whole = order.train_rows(1, 9, num_train=64, batch_size=8, parts=parts)
    rest = order.train_rows(1, 9, num_train=64, batch_size=8, parts=parts, first_step=5)
    np.testing.assert_array_equal(rest, whole[5 * 4 :])
    assert len(order.train_rows(1, 9, num_train=64, batch_size=8, parts=parts, first_step=8)) == 0


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_evaluation_indices_belong_to_one_rank_each(num_ranks: int) -> None:
    shares = [order.eval_rows(31, rank, num_ranks)[:, 0].tolist() for rank in range(num_ranks)]
    assert sorted(index for share in shares for index in share) == list(range(31))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_samples_word_does_not_depend_on_its_neighbours() -> None:
    alone = order.sample_words(3, 1, np.array([41]))
    assert alone[0] == order.sample_words(3, 1, np.arange(100))[41]
    assert len(np.unique(order.sample_words(3, 1, np.arange(100_000)))) == 100_000


def test_words_are_uniform_and_uncorrelated_between_epochs() -> None:
    first, second = (order.sample_words(0, epoch, np.arange(20_000)) / 2.0**64 for epoch in (0, 1))
    assert abs(first.mean() - 0.5) < 0.01  # 5 standard errors
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.035
