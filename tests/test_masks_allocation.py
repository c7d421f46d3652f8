"""Do random masks hold exactly the weights they should, shared out as the papers say?"""

from __future__ import annotations

import math

import pytest
import torch

from ghostmask.masks.drawn import random_mask
from ghostmask.masks.scoring.allocation import layer_counts
from ghostmask.masks.scoring.topk import kept_count

SHAPES = [(64, 3, 7, 7), (64, 64, 1, 1), (128, 64, 3, 3), (512, 512, 3, 3), (10, 512)]
SIZES = [math.prod(shape) for shape in SHAPES]


def densities(density: float, allocation: str, **settings: int) -> list[float]:
    counts = layer_counts(SHAPES, density, allocation, **settings)
    return [count / size for count, size in zip(counts, SIZES, strict=True)]


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk"])
@pytest.mark.parametrize("density", [1e-5, 1e-4, 0.01, 0.1, 0.5, 0.999, 1.0])
def test_the_counts_add_up_exactly_and_fit_their_layers(density: float, allocation: str) -> None:
    counts = layer_counts(SHAPES, density, allocation)
    assert sum(counts) == kept_count(density, sum(SIZES))
    assert all(0 <= count <= size for count, size in zip(counts, SIZES, strict=True))


def test_uniform_gives_every_layer_the_same_density() -> None:
    assert densities(0.1, "uniform") == pytest.approx([0.1] * 5, abs=1e-3)


@pytest.mark.parametrize(("allocation", "dimensions"), [("er", 2), ("erk", 4)])
def test_densities_are_proportional_to_the_sum_over_the_product_of_the_shape(allocation: str, dimensions: int) -> None:
    expected = [sum(s[:dimensions]) / math.prod(s[:dimensions]) for s in SHAPES]
    found = densities(0.003, allocation)
    sparse = [i for i in range(5) if found[i] < 1]
    assert len(sparse) >= 4
    ratios = [found[i] / expected[i] for i in sparse]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.02)
    assert all(expected[i] * ratios[0] > 1 for i in range(5) if i not in sparse), "dense only where it would exceed 1"


def test_a_minimum_per_layer_holds_and_the_rest_is_shared() -> None:
    counts = layer_counts(SHAPES, 1e-4, "erk", min_per_layer=30)
    assert min(counts) >= 30
    assert sum(counts) == kept_count(1e-4, sum(SIZES))
    with pytest.raises(ValueError, match=r"5 layers need 500 weights, mask\.density = 0\.0001 keeps 245"):
        layer_counts(SHAPES, 1e-4, "erk", min_per_layer=100)


def test_a_random_mask_is_a_function_of_seed_and_name_and_evenly_spread() -> None:
    like = torch.zeros(40, 50)
    mask = random_mask(like, 500, 1, "a")
    assert int(mask.sum()) == 500
    assert torch.equal(mask, random_mask(like, 500, 1, "a"))
    assert not torch.equal(mask, random_mask(like, 500, 2, "a"))
    assert not torch.equal(mask, random_mask(like, 500, 1, "b"))
    frequency = torch.stack([random_mask(like, 500, seed, "a") for seed in range(300)]).double().mean(0)
    assert abs(float(frequency.mean()) - 0.25) < 1e-9
    assert float((frequency - 0.25).abs().max()) < 0.125  # five standard deviations


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk"])
@pytest.mark.parametrize("density", [0.003, 0.1, 0.5, 1.0])
def test_kernels_fill_the_budget_but_for_less_than_one(density: float, allocation: str) -> None:
    lengths = [math.prod(shape[2:]) for shape in SHAPES]
    kernels = layer_counts(SHAPES, density, allocation, 2, lengths=lengths)
    spent, allowed = sum(k * n for k, n in zip(kernels, lengths, strict=True)), kept_count(density, sum(SIZES))
    assert allowed - max(lengths) < spent <= allowed
    assert all(2 <= k <= size // n for k, size, n in zip(kernels, SIZES, lengths, strict=True))
    free, weights = (
        layer_counts(SHAPES, density, allocation, lengths=lengths),
        layer_counts(SHAPES, density, allocation),
    )
    assert all(abs(k * n - w) <= n for k, n, w in zip(free, lengths, weights, strict=True))
