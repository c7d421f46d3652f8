"""Do the update rules compute what torch's optimizers do, bit for bit the same wherever a slice is cut?"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostmask.engine.sharding.optimizer import NORM_CHUNK, squared_norm
from ghostmask.engine.sharding.rules import LANES, Adam, Scale, Sgd, UpdateRule

RULES: list[tuple[UpdateRule, type[torch.optim.Optimizer], dict[str, Any]]] = [
    (Sgd(0.9, 5e-4), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4}),
    (Sgd(0.9, 5e-4, nesterov=True), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    (Sgd(0.0), torch.optim.SGD, {}),
    (Adam(), torch.optim.Adam, {}),
    (Adam((0.8, 0.95), 1e-6, 1e-2), torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 1e-2}),
]
AS_IT_IS = Scale(torch.ones(()), torch.zeros(()))


def updated(rule: UpdateRule, start: Tensor, gradients: list[Tensor], scale: Scale = AS_IT_IS) -> tuple[Tensor, ...]:
    """(value, buffers ...) after an update with each gradient, at rates 0.01, 0.02, ..."""
    value, buffers = start.clone(), [torch.zeros_like(start) for _ in rule.buffers]
    for number, gradient in enumerate(gradients):
        rule.update(value, gradient.clone(), buffers, 0.01 * (number + 1), number, scale)
    return value, *buffers


@pytest.mark.parametrize(("rule", "reference", "settings"), RULES)
@pytest.mark.parametrize("divisor", [1.0, 2.5])
def test_a_rule_moves_a_value_as_torchs_optimizer_does(
    rule: UpdateRule, reference: type[torch.optim.Optimizer], settings: dict[str, Any], divisor: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(7, 3 * LANES + 5, generator=generator).unbind()
    value, *_ = updated(rule, start, gradients, Scale(torch.tensor(divisor), torch.zeros(())))
    expected = start.double().requires_grad_()
    optimizer = reference([expected], lr=1.0, **settings)
    for number, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 0.01 * (number + 1)
        expected.grad = gradient.double() / divisor
        optimizer.step()
    torch.testing.assert_close(value.double(), expected.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES])
def test_a_skipped_update_changes_no_bit(rule: UpdateRule) -> None:
    generator = torch.Generator().manual_seed(1)
    value, gradient, *buffers = torch.randn(2 + len(rule.buffers), LANES + 7, generator=generator).unbind()
    before = [t.clone() for t in (value, *buffers)]
    gradient[3] = float("nan")
    rule.update(value, gradient, buffers, 0.1, 4, Scale(torch.ones(()), torch.ones(())))
    assert all(torch.equal(a, b) for a, b in zip(before, (value, *buffers), strict=True))


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES])
def test_an_element_moves_by_the_same_bits_wherever_a_slice_begins_and_ends(rule: UpdateRule) -> None:
    numel = 5 * LANES + 13
    start, *gradients = torch.randn(5, numel, generator=torch.Generator().manual_seed(2)).unbind()
    whole = updated(rule, start, gradients)
    cuts = [0, 1, 2, 9, 40, LANES, LANES + 1, 2 * LANES + 33, 4 * LANES, numel]
    for low, high in [*itertools.pairwise(cuts), (3, numel), (0, numel - 1), (17, 17 + 2 * LANES), (5, 5)]:
        piece = updated(rule, start[low:high], [g[low:high] for g in gradients])
        assert all(torch.equal(w[low:high], p) for w, p in zip(whole, piece, strict=True)), (low, high)


def test_a_norm_is_a_float64_sum_that_does_not_depend_on_chunks() -> None:
    vector = torch.full((2 * NORM_CHUNK + 3,), 2.0**-12)
    vector[0] = 2.0**14
    assert float(squared_norm(vector)) == 2.0**28 + (2 * NORM_CHUNK + 2) * 2.0**-24
    assert float(squared_norm(torch.zeros(0))) == 0.0
