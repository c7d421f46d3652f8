"""Is the projection with costs the nearest point within the budget, on any ranks, in three collectives?"""

from __future__ import annotations

import pytest
import torch
from counting_world import CountingWorld
from torch import Tensor

from ghostmask.engine.errors import RunStopped
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.kernels import projection
from ghostmask.masks.kernels.projection_costs import project_costs_

Priced = dict[int, Tensor]


def cases() -> dict[str, tuple[Priced, float]]:
    """name -> (cost -> its probabilities, share of the cost of all)."""
    g = torch.Generator().manual_seed(5)

    def drawn(n: int) -> Tensor:
        return torch.rand(n, generator=g) * 1.4 - 0.2

    def ones(n: int) -> Tensor:
        return torch.ones(n)

    powers = {784: 300, 196: 1200, 49: 4000}
    odd = {22201: 100, 5329: 700, 1225: 900, 1: 3000}
    return {
        "powers of two": ({c: drawn(n) for c, n in powers.items()}, 0.2),
        "any costs": ({c: drawn(n) for c, n in odd.items()}, 0.1),
        "kernels": ({c: drawn(n) for c, n in {9: 4000, 1: 3000, 49: 50}.items()}, 0.05),
        "all one": ({c: ones(n) for c, n in odd.items()}, 0.3),
        "all one, powers": ({c: ones(n) for c, n in powers.items()}, 0.9),
        "two values": ({c: (drawn(n) > 0.5) * 0.3 + 0.6 for c, n in odd.items()}, 0.02),
        "feasible": ({c: drawn(n) * 0.1 for c, n in odd.items()}, 0.5),
        "one cost": ({7: drawn(2000)}, 0.1),
        "outside": ({c: 40 * drawn(n) for c, n in odd.items()}, 0.2),
        "some free": ({0: drawn(500), **{c: drawn(n) for c, n in powers.items()}}, 0.1),
    }


def reference(z: Priced, budget: float, even: bool) -> tuple[Priced, float]:
    """By bisection in float64."""
    wide = {c: t.double() for c, t in z.items()}
    shifts = {c: float(c > 0) if even else float(c) for c in z}

    def cost(v: float) -> float:
        return sum(c * float((t - v * shifts[c]).clamp(0, 1).sum()) for c, t in wide.items())

    low, high = 0.0, max(float(t.max()) / shifts[c] for c, t in wide.items() if c)
    if cost(0) <= budget:
        return {c: t.clamp(0, 1) for c, t in wide.items()}, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    return {c: (t - high * shifts[c]).clamp(0, 1) for c, t in wide.items()}, high


def budget_of(z: Priced, share: float) -> float:
    return share * sum(c * len(t) for c, t in z.items())


def mine(world: World, even: bool) -> dict[str, tuple[float, Priced, int]]:
    """Of each case v, this rank's projected share, and the number of all-reduces."""
    found = {}
    for name, (z, share) in cases().items():
        counted = CountingWorld(world.rank, world.size, world.device, world.group)
        runs, begin = {}, 0
        for c, t in z.items():
            edges = [len(t) * i * i // world.size**2 for i in range(world.size + 1)]
            low, high = edges[world.rank], edges[world.rank + 1]
            runs[c] = [(t[low:high].clone(), begin + low)]
            begin += len(t)
        v = float(project_costs_(runs, budget_of(z, share), counted, even=even))
        found[name] = (v, {c: own[0][0] for c, own in runs.items()}, len(counted.calls))
    return found


@pytest.mark.parametrize("even", [False, True])
def test_the_projection_with_costs_equals_the_float64_bisection_on_any_ranks(even: bool) -> None:
    alone = mine(single(), even)
    for name, (z, share) in cases().items():
        wanted, v = reference(z, budget_of(z, share), even)
        own, calls = alone[name][1], alone[name][2]
        assert calls == (1 if v == 0 else 3), name
        assert alone[name][0] == pytest.approx(v, rel=1e-6, abs=1e-12), name
        for c in z:
            size = max(1.0, float(z[c].abs().max()))  # breakpoints are float32 numbers
            assert torch.allclose(own[c].double(), wanted[c], atol=2e-7 * size), (name, c)
        spent = sum(c * float(t.double().sum()) for c, t in own.items())
        slack = 1e-8 if even or "powers" in name else 1e-7
        assert spent == pytest.approx(sum(c * float(t.sum()) for c, t in wanted.items()), rel=slack), name
    for ranks in (2, 4):
        results = run_distributed(mine, ranks, even)
        for name in cases():
            assert {r[name][0] for r in results} == {alone[name][0]}, (name, ranks)
            for c, whole in alone[name][1].items():
                assert torch.equal(torch.cat([r[name][1][c] for r in results]), whole), (name, ranks, c)


def test_without_kernels_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = mine(single(), False)
    monkeypatch.setattr(projection, "kernels_on", lambda *_: None)
    for name, (v, own, calls) in mine(single(), False).items():
        assert (v, calls) == (compiled[name][0], compiled[name][2]), name
        assert all(torch.equal(own[c], compiled[name][1][c]) for c in own), name


def test_what_is_not_finite_stops_the_run() -> None:
    for value in (torch.nan, torch.inf):
        z = torch.tensor([0.5, value, 0.1])
        with pytest.raises(RunStopped, match="1 probabilities are not finite"):
            project_costs_({1: [(z, 0)], 4: [(torch.ones(3), 3)]}, 1.0, single())
