"""How long does an update take that cuts a new mask: the search for the largest, and whole updates of the methods?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghostmask.benchmarks.row import Row, faster, share
from ghostmask.benchmarks.timing import Bench, interleaved
from ghostmask.engine.sharding.optimizer import ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Reparametrization
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import single
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.methods.dnw import Largest
from ghostmask.masks.methods.edge_popup import Popup
from ghostmask.masks.methods.feather import CubicThreshold
from ghostmask.masks.methods.st3 import SoftThreshold
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

GLOBAL, LAYERWISE = Budget(0.1), Budget(0.1, "layerwise")
FORMS: dict[str, Callable[[Sgd], Reparametrization]] = {
    "fixed": FixedMask,
    "dnw": lambda rule: Largest(rule, LAYERWISE),
    "st3": lambda rule: SoftThreshold(rule, GLOBAL, 0, 1),
    "feather": lambda rule: CubicThreshold(rule, GLOBAL, 0, 1, 1.0),
    "edge_popup": lambda rule: Popup(rule, LAYERWISE),
}


def rows(bench: Bench) -> list[Row]:
    """Cases largest_global and largest_layerwise beside torch.topk, and cut_NAME: one update beside a fixed mask's."""
    model, side = ("resnet20", 32) if bench.quick else ("resnet50", 224)
    net = build_model(ModelConfig(name=model), 1000, (3, side, side), seed=1).to(bench.device)
    weights = prunable_weights(net)
    part = Slice.even(weights, single(bench.device))
    scores = part.cut(weights).abs()

    def topk(pieces: tuple[Tensor, ...]) -> None:
        for piece in pieces:
            torch.zeros_like(piece, dtype=torch.bool)[piece.topk(len(piece) // 10).indices] = True

    whole, layers = (scores,), torch.split(scores, part.layout.numels)
    found = interleaved(
        {
            "global": lambda: largest(part, scores, GLOBAL, wait=False), "topk global": lambda: topk(whole),
            "layerwise": lambda: largest(part, scores, LAYERWISE, wait=False), "topk layerwise": lambda: topk(layers),
        }, 1 if bench.quick else 5, bench.device,
    )  # fmt: skip
    note = f"{part.total:,} weights in {len(weights)} layers, 10 % of them; baseline: torch.topk"
    result = [
        faster(f"largest_{kind}", 1e3 * found[kind], 1e3 * found[f"topk {kind}"], "ms", note)
        for kind in ("global", "layerwise")
    ]
    return result + _updates(bench, weights)


def _updates(bench: Bench, weights: dict[str, torch.nn.Parameter]) -> list[Row]:
    optimizers = {}
    for name, make in FORMS.items():
        own = {n: torch.nn.Parameter(w.detach().clone()) for n, w in weights.items()}
        optimizers[name] = ShardedOptimizer([ParameterGroup("prunable", own, make(Sgd(0.9, 1e-4)), 0.01)])
        for p in own.values():
            p.grad = torch.full_like(p, 1e-3)
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    found = interleaved(steps, 1 if bench.quick else 5, bench.device)
    note = "one update of all prunable weights; baseline: under a mask that stays"
    return [
        share(f"cut_{name}", 1e3 * found[name], 1e3 * found["fixed"], "ms", note) for name in FORMS if name != "fixed"
    ]
