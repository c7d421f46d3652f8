"""Does LRsI follow the gradient of its objectives, the same on 1 and on N ranks, and does it lower them?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

from ghostmask.engine.data import Batch
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.models.rescaling import Rescaled, learn_factors


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 3)).double()


def batches(num: int = 3, size: int = 12) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num, size, 5, generator=generator, dtype=torch.float64)
    return [Batch(x, x[:, :3].argmax(1)) for x in images]


def learn(
    world: World, data: Iterator[Batch], steps: int, gamma: float, scale: float = 1.0, *, net: nn.Module | None = None,
    parts: int = 1, normalize: bool = True,
) -> Rescaled:  # fmt: skip
    """parts: pieces that each batch consists of, one after the other."""
    net = net or network()
    parameters = {n: p * scale for n, p in net.named_parameters()}
    # Copies: where a part begins inside a larger tensor, vectorised sums may round otherwise.
    cut = ([Batch(a.clone(), b) for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)] for x, y in data)
    return learn_factors(
        lambda values, images: functional_call(net, dict(values), (images,)), parameters, cut, world,
        steps=steps, lr=1e-2, eta=0.1, gamma=gamma, normalize=normalize,
    )  # fmt: skip


def objective(net: nn.Module, factors: Tensor, batch: Batch) -> Tensor:
    """|gradient of the loss| at factors x parameters, in the obvious way."""
    start = {n: p.detach() for n, p in net.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(functional_call(net, values, (batch.images,)), batch.labels)

    gradients = grad(loss)({n: f * p for f, (n, p) in zip(factors, start.items(), strict=True)})
    return torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()


def test_the_first_update_goes_against_the_gradient_of_the_norm() -> None:
    data, net = batches(), network()
    slope = grad(lambda f: objective(net, f, data[0]))(torch.ones(4, dtype=torch.float64))
    learned = learn(single(), iter(data), 1, gamma=0.0)
    assert learned.gradient_norms == pytest.approx([float(objective(net, torch.ones(4), data[0]))])
    # Adam's first step is lr x the sign of the gradient.
    moved = torch.tensor(list(learned.factors.values()), dtype=torch.float64) - 1
    torch.testing.assert_close(moved, -1e-2 * slope.sign(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_below_gamma_the_first_update_goes_against_the_gradient_of_the_look_ahead_loss(normalize: bool) -> None:
    data, net = batches(), network()
    start = {n: p.detach() for n, p in net.named_parameters()}

    def loss(values: dict[str, Tensor], batch: Batch) -> Tensor:
        return functional.cross_entropy(functional_call(net, values, (batch.images,)), batch.labels)

    gradients = grad(loss)(start, data[0])
    norm = float(objective(net, torch.ones(4), data[0])) if normalize else 1.0
    mixed = Batch(*(torch.cat([a[:6], b[6:]]) for a, b in zip(data[0], data[1], strict=True)))
    ahead = {n: p - 0.1 * gradients[n] / norm for n, p in start.items()}
    slopes = grad(loss)(ahead, mixed)
    learned = learn(single(), iter(data), 1, gamma=1e9, normalize=normalize)
    assert learned.losses == pytest.approx([float(loss(ahead, mixed))])
    expected = {n: 1 - 1e-2 * float((slopes[n] * start[n]).sum().sign()) for n in start}
    assert learned.factors == pytest.approx(expected, abs=1e-6)


def recomputed(steps: int, gamma: float, normalize: bool) -> tuple[list[float], str]:
    """(the factors after `steps` updates, the objective of each: N or L), number by number as GradInit has it."""
    data, net = batches(), network()
    start = [p.detach() for p in net.parameters()]
    names = [n for n, _ in net.named_parameters()]
    alpha, kinds = [1.0] * 4, ""
    first, second = {"N": [0.0] * 4, "L": [0.0] * 4}, [0.0] * 4

    def loss(values: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(net, dict(zip(names, values, strict=True)), images), labels)

    for step in range(steps):
        batch, following = data[step % 3], data[(step + 1) % 3]
        factors = torch.tensor(alpha, dtype=torch.float64)
        norm = float(objective(net, factors, batch))

        if norm > gamma:
            kinds += "N"
            slope = grad(lambda f, batch=batch: objective(net, f, batch))(factors)
        else:
            kinds += "L"
            g = grad(loss)([a * p for a, p in zip(alpha, start, strict=True)], *batch)
            moved = [0.1 * x / (norm if normalize else 1) for x in g]
            mixed = [torch.cat([x[:6], y[6:]]) for x, y in zip(batch, following, strict=True)]

            def after(f: Tensor, moved: Any = moved, mixed: Any = mixed) -> Tensor:
                return loss([a * p - m for a, p, m in zip(f, start, moved, strict=True)], *mixed) / 0.1

            slope = grad(after)(factors)
        for i, raw in enumerate(slope.tolist()):
            x = max(-1.0, min(1.0, raw))
            moment = first[kinds[-1]]
            moment[i] = 0.9 * moment[i] + 0.1 * x
            second[i] = 0.999 * second[i] + 0.001 * x * x
            unbiased = moment[i] / (1 - 0.9 ** kinds.count(kinds[-1]))
            spread = math.sqrt(second[i] / (1 - 0.999 ** (step + 1))) + 1e-8
            alpha[i] = max(alpha[i] - 0.01 * unbiased / spread, 0.0 if names[i].endswith("bias") else 0.01)
    return alpha, kinds


@pytest.mark.parametrize("normalize", [True, False])
def test_factors_are_those_of_gradinits_adam_while_the_objective_changes(normalize: bool) -> None:
    expected, kinds = recomputed(12, 0.42, normalize)
    assert "NL" in kinds
    assert "LN" in kinds
    learned = learn(single(), cycle(batches()), 12, gamma=0.42, normalize=normalize)
    assert len(learned.losses) == kinds.count("L")
    assert list(learned.factors.values()) == pytest.approx(expected, abs=1e-9)
    otherwise, _ = recomputed(12, 0.42, not normalize)
    assert list(learned.factors.values()) != pytest.approx(otherwise, abs=1e-4)


def test_a_large_gradient_is_made_smaller_and_then_the_loss_too() -> None:
    learned = learn(single(), cycle(batches()), 300, gamma=1.0, scale=4.0)
    assert learned.gradient_norms[0] > 1.3
    assert max(learned.gradient_norms[-20:]) < 1.2
    assert sum(learned.losses[-10:]) < sum(learned.losses[:10])
    assert min(learned.factors.values()) >= 0.01


def shared(world: World, gamma: float) -> Any:
    mine = [Batch(b.images[world.rank :: world.size], b.labels[world.rank :: world.size]) for b in batches()]
    return learn(world, cycle(mine), 20, gamma)


def test_ranks_agree_and_follow_the_gradient_of_the_whole_batch() -> None:
    alone = learn(single(), cycle(batches()), 20, gamma=0.0)
    both = run_distributed(shared, 2, 0.0)
    assert both[0] == both[1]
    assert both[0].factors == pytest.approx(alone.factors, abs=1e-6)
    assert both[0].gradient_norms == pytest.approx(alone.gradient_norms)
    looked_ahead = run_distributed(shared, 2, 1e9)
    assert looked_ahead[0] == looked_ahead[1]
    assert sum(looked_ahead[0].losses[-3:]) < sum(looked_ahead[0].losses[:3])  # 3 batches, in turn


def with_batch_norm() -> nn.Module:
    torch.manual_seed(2)
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return nn.Sequential(nn.Linear(5, 8), norm, nn.Softplus(), nn.Linear(8, 3))


def in_parts(world: World, total: int, backwards: bool = False) -> Rescaled:
    """In float32. Part p of a batch is its samples p, p + total, ...; a rank has total / size of them, one after the
    other; backwards: the first rank has the last ones."""
    count = total // world.size
    place = world.size - 1 - world.rank if backwards else world.rank
    mine = [
        Batch(
            torch.cat([x[p::total] for p in range(place * count, (place + 1) * count)]).float(),
            torch.cat([y[p::total] for p in range(place * count, (place + 1) * count)]),
        )
        for x, y in batches()
    ]
    return learn(world, cycle(mine), 8, 0.9, net=with_batch_norm(), parts=count)


def test_factors_depend_on_the_parts_of_a_batch_but_not_by_a_bit_on_the_ranks_that_share_them() -> None:
    alone = in_parts(single(), 4)
    assert 0 < len(alone.losses) < 8, "only one of the objectives is tried"
    for size, backwards in ((2, False), (2, True), (4, False)):
        assert run_distributed(in_parts, size, 4, backwards) == [alone] * size
    assert in_parts(single(), 1).factors != pytest.approx(alone.factors, abs=1e-3)
