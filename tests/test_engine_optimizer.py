"""Do the update rules compute what torch's own optimizers do, whatever the memory order of a gradient is?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghostmask.engine.sharding.optimizer import Adam, ParameterGroup, ProjectedOptimizer, Sgd, UpdateRule

RULES: list[tuple[UpdateRule, type[torch.optim.Optimizer], dict[str, Any]]] = [
    (Sgd(0.9, 5e-4), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4}),
    (Sgd(0.9, 5e-4, nesterov=True), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    (Sgd(0.0), torch.optim.SGD, {}),
    (Adam(), torch.optim.Adam, {}),
]


@pytest.mark.parametrize(("rule", "reference", "settings"), RULES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_rule_moves_parameters_as_torchs_optimizer_does(
    rule: UpdateRule, reference: type[torch.optim.Optimizer], settings: dict[str, Any], layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 4, 3, 3), (10,))]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    expected = reference([p.double().detach().requires_grad_() for p in theirs], lr=0.01, **settings)
    optimizer = ProjectedOptimizer([ParameterGroup("weight", {str(i): p for i, p in enumerate(ours)}, rule, 0.01)])
    optimizer.allocate_state()
    for _ in range(5):
        for mine, other in zip(ours, expected.param_groups[0]["params"], strict=True):
            grad: Tensor = torch.randn(mine.shape, generator=generator)
            mine.grad = grad.contiguous(memory_format=layout) if grad.dim() == 4 else grad
            other.grad = grad.double()
        optimizer.step()
        expected.step()
    for mine, other in zip(ours, expected.param_groups[0]["params"], strict=True):
        assert torch.allclose(mine.double(), other, atol=1e-6)
