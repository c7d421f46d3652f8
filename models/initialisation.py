"""How do the CIFAR networks start: Kaiming-normal weights, as in the published ProbMask code."""

from __future__ import annotations

from torch import nn


def kaiming_normal(net: nn.Module) -> None:
    """Draw every convolution and linear weight of `net` from N(0, 2 / fan_in), in module order; biases become 0.

    Uses torch's global CPU generator (`models.build.build_model` seeds it). Batch norm keeps weight 1 and bias 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
