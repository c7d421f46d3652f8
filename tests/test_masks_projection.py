"""Is the sharded projection exact, the same on every rank and for every world size, in at most three collectives?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from counting_world import CountingWorld
from torch import Tensor

from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.kernels import projection
from ghostmask.masks.kernels.projection import Runs, project_

RESNET50 = 25_502_912
"""Prunable weights of ResNet-50."""
SIZES = (1, 2, 3, 4)


def counting(world: World) -> CountingWorld:
    return CountingWorld(world.rank, world.size, world.device, world.group)


def project(runs: Runs, budget: float, numel: int, world: World) -> Tensor:
    """With one budget for all; returns its v, ()."""
    return project_([runs], [budget], [numel], world)[0]


def reference(z: Tensor, budget: float) -> tuple[np.ndarray, float]:
    """(projection, v) in float64: exact between the two sorted breakpoints around the root."""
    x = z.double().numpy()
    value = lambda v: float(np.clip(x - v, 0, 1).sum())  # noqa: E731
    if value(0.0) <= budget:
        return np.clip(x, 0, 1), 0.0
    points = np.unique(np.concatenate([x, x - 1, [0.0]]))
    points = points[points >= 0]
    low, high = 0, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(points[middle]) > budget else (low, middle)
    a, b = points[low], points[high]
    slope = (value(a) - value(b)) / (b - a)
    v = float(b - (budget - value(b)) / slope)
    return np.clip(x - v, 0, 1), v


def cases() -> dict[str, tuple[Tensor, float]]:
    """name -> (z, budget)."""
    g = torch.Generator().manual_seed(5)
    n = 4001
    uniform, normal = torch.rand(n, generator=g), torch.randn(n, generator=g)
    made = {
        "uniform": (uniform, 0.1 * n),
        "uniform, k = 0.9": (uniform + 0.5, 0.9 * n),
        "constant": (torch.full((n,), 0.7), 0.05 * n),
        "all one": (torch.ones(n), 0.9 * n),
        "all one, tiny K": (torch.ones(n), 1e-3),
        "all zero": (torch.zeros(n), 0.1 * n),
        "two values": ((uniform > 0.5) * 0.3 + 0.6, 0.3 * n),
        "two values, far apart": ((uniform > 0.98) * 0.999 + 0.001, 0.05 * n),
        "feasible": (uniform, 0.8 * n),
        "K = n": (uniform + 1, float(n)),
        "K = n - 1": (uniform + 1, n - 1.0),
        "K = 0": (uniform, 0.0),
        "K = 0.5": (normal, 0.5),
        "outside [0, 1]": (3 * normal + 1, 0.2 * n),
        "far outside": (1000 * normal, 0.2 * n),
        "outliers": (torch.where(uniform > 0.999, 1e30, normal), 0.1 * n),
        "negative": (-uniform, 0.1 * n),
        "subnormal": (uniform * 1e-42, 0.0),
        "one element": (torch.tensor([0.9]), 0.25),
    }
    for seed in range(20):
        scale, shift = 10 ** float(torch.rand((), generator=g) * 4 - 2), float(torch.randn((), generator=g))
        z = (torch.randn(100 + 37 * seed, generator=g) * scale + shift).round(decimals=seed % 6)
        made[f"sweep {seed}"] = (z, float(torch.rand((), generator=g)) * len(z))
    return {name: (z.clone(), budget) for name, (z, budget) in made.items()}


Result = tuple[Any, np.ndarray, int]
"""(v or those of all layers, this rank's projected shard, number of all-reduces)"""


def my_runs(z: Tensor, world: World, pieces: int = 1) -> list[tuple[Tensor, int]]:
    """This rank's share of z as runs with the index of their first element; ranks hold unequal shares, or nothing."""
    edges = [len(z) * i * i // (world.size * pieces) ** 2 for i in range(world.size * pieces + 1)]
    mine = range(world.rank * pieces, (world.rank + 1) * pieces)
    return [(z[edges[i] : edges[i + 1]].clone(), edges[i]) for i in mine]


def project_mine(z: Tensor, budget: float, world: World, pieces: int = 1) -> Result:
    counted, runs = counting(world), my_runs(z, world, pieces)
    v = float(project(runs, budget, len(z), counted))
    return v, torch.cat([run for run, _ in runs]).numpy(), len(counted.calls)


def run_all_cases(world: World) -> dict[str, Result]:
    """name -> result of each case; one spawn of ranks does them all."""
    results = {name: project_mine(z, budget, world) for name, (z, budget) in cases().items()}
    results["in pieces"] = project_mine(*cases()["uniform"], world, pieces=5)
    results["large constant"] = large_constant(world)
    results["layers"] = project_my_layers(world)
    shard = torch.full((5,), 0.5)
    if world.rank == world.size - 1:
        shard[2] = float("nan")
    with pytest.raises(RunStopped, match=f"1 of {5 * world.size} probabilities are not finite"):
        project([(shard, 5 * world.rank)], 1.0, 5 * world.size, world)
    return results


def large_constant(world: World) -> Result:
    """ProbMask's real start: all probabilities equal, at ResNet-50's size; of the result, its float64 sum."""
    n = RESNET50 if world.size == 2 else 10_007
    v, z, calls = project_mine(torch.full((n,), 0.9937), 0.0123 * n, world)
    return v, z.astype(np.float64).sum(), calls


LAYERS = (1000, 1, 37, 5000, 260)
LAYER_BUDGETS = (100.0, 0.5, 37.0, 50.0, 0.0)


def layered() -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.rand(n, generator=g) + 0.3 * i for i, n in enumerate(LAYERS)]


def project_my_layers(world: World) -> Result:
    """Every rank holds a part of every layer."""
    counted, runs, offset = counting(world), [], 0
    for z in layered():
        runs.append([(run, offset + first) for run, first in my_runs(z, world)])
        offset += len(z)
    thresholds = project_(runs, LAYER_BUDGETS, LAYERS, counted)
    return thresholds.tolist(), np.concatenate([run.numpy() for part in runs for run, _ in part]), len(counted.calls)


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Result]]]:
    """world size -> every rank's results."""
    return {1: [run_all_cases(single())]} | {n: run_distributed(run_all_cases, n) for n in SIZES[1:]}


def join(ranks: list[dict[str, Result]], name: str) -> Tensor:
    return torch.from_numpy(np.concatenate([rank[name][1] for rank in ranks]))


@pytest.mark.parametrize("size", SIZES)
def test_projection_equals_the_float64_reference_on_any_number_of_ranks(runs: Any, size: int) -> None:
    for name, (z, budget) in cases().items():
        joined = join(runs[size], name)
        expected, v = reference(z, budget)
        assert np.abs(joined.double().numpy() - expected).max() <= 1e-6, name
        assert runs[size][0][name][0] == pytest.approx(v, rel=1e-9, abs=1e-9), name
        if v > 0:
            assert abs(float(joined.double().sum()) - budget) <= 1e-3, name


@pytest.mark.parametrize("size", SIZES)
def test_result_is_bit_identical_on_every_rank_and_world_size(runs: Any, size: int) -> None:
    for name in cases():
        v, alone, _calls = runs[1][0][name]
        assert {rank[name][0] for rank in runs[size]} == {v}, name
        assert np.array_equal(join(runs[size], name), alone), name
    assert runs[size][0]["in pieces"][0] == runs[1][0]["uniform"][0]
    assert np.array_equal(join(runs[size], "in pieces"), runs[1][0]["uniform"][1])


@pytest.mark.parametrize("size", SIZES)
def test_projection_takes_at_most_three_collectives_and_one_if_feasible(runs: Any, size: int) -> None:
    for rank in runs[size]:
        assert {rank[name][2] for name in [*cases(), "large constant"]} == {1, 3}
        assert rank["feasible"][2] == rank["K = n"][2] == 1


def test_equal_probabilities_of_resnet50_hit_the_budget(runs: Any) -> None:
    total = sum(float(rank["large constant"][1]) for rank in runs[2])
    assert abs(total - 0.0123 * RESNET50) <= 1e-3
    assert runs[2][0]["large constant"][0] == pytest.approx(float(torch.tensor(0.9937)) - 0.0123, abs=1e-12)


def test_threshold_does_not_depend_on_the_order_of_the_elements() -> None:
    for name, (z, budget) in cases().items():
        shuffled = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(1))]
        v = [project([(x, 0)], budget, len(x), single()) for x in (z, shuffled)]
        assert v[0] == v[1], name


def test_projecting_twice_changes_nothing_beyond_rounding() -> None:
    for name, (z, budget) in cases().items():
        once = z.clone()
        project([(once, 0)], budget, len(z), single())
        twice = once.clone()
        project([(twice, 0)], budget, len(z), single())
        assert (twice - once).abs().max() <= 1.2e-7, name


def test_torch_form_gives_the_bits_of_the_compiled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {name: z for name, (z, _) in cases().items()}
    halves = lambda z: [(z[: len(z) // 3], 7), (z[len(z) // 3 :], 7 + len(z) // 3)]  # noqa: E731
    values = {name: project(halves(compiled[name]), k, len(z), single()) for name, (z, k) in cases().items()}
    monkeypatch.setattr(projection, "kernels_on", lambda device, module: None)
    monkeypatch.setattr(projection, "CHUNK", 1000)
    for name, (z, budget) in cases().items():
        assert project([(z, 7)], budget, len(z), single()) == values[name], name
        assert torch.equal(z, compiled[name]), name


def test_threads_share_the_work_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "SMALLEST_RANGE", 100)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        z, budget = cases()["outside [0, 1]"]
        results.append((project([(z, 0)], budget, len(z), single()), z))
    torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", ["normal", "two values"])
def test_budget_is_hit_within_a_thousandth_at_the_size_of_resnet50(kind: str) -> None:
    g = torch.Generator().manual_seed(2)
    z = torch.rand(RESNET50, generator=g)
    if kind == "two values":
        z = (z > 0.3) * 0.25 + 0.6123
    budget, before = 0.1 * RESNET50, z.clone()
    v = float(project([(z, 0)], budget, RESNET50, single()))
    exact = (before.double() - v).clamp_(0, 1)
    assert abs(float(exact.sum()) - budget) <= 1e-6  # so v is the root: f falls by at least 1 per unit of v
    assert float((exact - z).abs().max()) <= 6e-8
    assert abs(float(z.double().sum()) - budget) <= 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_every_layer_meets_its_own_budget_in_the_same_three_collectives(runs: Any, size: int) -> None:
    assert all(rank["layers"][0] == runs[1][0]["layers"][0] and rank["layers"][2] == 3 for rank in runs[size])
    edges = [[n * i * i // size**2 for i in range(size + 1)] for n in LAYERS]
    parts = [
        np.split(rank["layers"][1], np.cumsum([e[r + 1] - e[r] for e in edges])) for r, rank in enumerate(runs[size])
    ]
    alone = np.split(runs[1][0]["layers"][1], np.cumsum(LAYERS))
    for layer, (z, budget) in enumerate(zip(layered(), LAYER_BUDGETS, strict=True)):
        joined = np.concatenate([part[layer] for part in parts])
        assert np.array_equal(joined, alone[layer])
        assert np.abs(joined.astype(np.float64) - reference(z, budget)[0]).max() <= 1e-6


def test_a_rank_may_hold_nothing() -> None:
    assert project([], 1.0, 10, single()) == 0
    assert project_([[], []], [1.0, 2.0], [10, 10], single()).tolist() == [0, 0]
    z = torch.full((10,), 0.5)
    assert project([(z[:0], 0), (z, 0), (z[10:], 10)], 1.0, 10, single()) == pytest.approx(0.4)


def test_an_infinite_probability_stops_the_run() -> None:
    with pytest.raises(RunStopped, match="1 of 2 probabilities are not finite") as stopped:
        project([(torch.tensor([0.5, float("-inf")]), 0)], 1.0, 2, single())
    assert stopped.value.exit_code == EXIT_NON_FINITE


def test_what_is_no_float32_vector_or_no_budget_is_refused() -> None:
    for z in (torch.zeros(3, dtype=torch.float64), torch.zeros(2, 2), torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="give contiguous float32 vectors"):
            project([(z, 0)], 1.0, 4, single())
    with pytest.raises(ValueError, match="give a finite budget"):
        project([(torch.zeros(3), 0)], -1.0, 3, single())


@pytest.mark.parametrize("length", [0, 5, 16, 1000])
def test_marked_elements_are_appended_in_order_and_the_rest_left_alone(length: int) -> None:
    from ghostmask.masks.kernels.projection_cpu import _append

    rng = np.random.default_rng(length)
    values, marked = rng.random(length, np.float32), (rng.random(length) < 0.3).astype(np.uint8)
    out = np.full(length + 7, -1, np.float32)
    count = _append(values, marked, out, 3)
    assert out[:3].tolist() == [-1, -1, -1]
    assert out[3:count].tolist() == values[marked == 1].tolist()
