"""How does batch norm become part of the layer before it?"""

from __future__ import annotations

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ghostmask.launcher.exporting.tracing import uses

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_batch_norms(graph: fx.GraphModule) -> int:
    """Fold each batch norm into the convolution or linear layer whose output it alone reads, in place, in the type
    that the weights have (float64 loses nothing that counts); returns how many stay. Its nodes have meta["shape"]."""
    modules, used = dict(graph.named_modules()), uses(graph)
    left = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], BATCH_NORMS):
            continue
        before, norm = node.all_input_nodes[0], modules[node.target]
        layer = modules[before.target] if before.op == "call_module" else None
        alone = len(before.users) == 1 and norm.track_running_stats and used.get(str(before.target)) == 1
        if isinstance(layer, CONVOLUTIONS) and alone:
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear) and alone and len(node.meta["shape"]) == 2:  # else channels are dimension 1
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            left += 1
            continue
        graph.set_submodule(before.target, fused)
        modules[before.target] = fused
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return left
