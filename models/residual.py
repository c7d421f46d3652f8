"""How can residual blocks start as identities: the last batch norm of each has weight 0 at first."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ghostmask.engine.errors import bad_value


def zero_init_last(net: nn.Module) -> nn.Module:
    """`net` itself, with weight 0 in the last batch norm of each of torchvision's residual blocks (He et al. 2019).

    Raises InputError where there is no such block.
    """
    blocks = [m for m in net.modules() if isinstance(m, BasicBlock | Bottleneck)]
    if not blocks:
        fix = "this network has no residual blocks of torchvision's; set it to false"
        raise bad_value("model.zero_init_last", True, fix)
    for block in blocks:
        last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        nn.init.zeros_(last.weight)
    return net
