"""ghostmask as a library: an optimizer that makes any network sparse in anybody's training loop.

    optimizer = ghostmask.optimizer(net, ghostmask.probmask(density=0.1, steps=10_000), lr=0.1)

It is a torch.optim.Optimizer whose parameters are functions of its state. As with Schedule-Free optimizers, call
`optimizer.train()` and `optimizer.eval()` where the network's are called: after `eval()` the network holds the sparse
weights that would be delivered now. Batch norm's running statistics belong to the weights that were trained with; where
these differ (probmask), forward a few batches in training mode after `eval()` before the network is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghostmask.engine.config import require_number
from ghostmask.engine.errors import InputError, bad_value
from ghostmask.engine.sharding.optimizer import Sampling, ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup, WholePlacement
from ghostmask.engine.sharding.reparametrization import Plain
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import World, single
from ghostmask.masks.granularity import units_of
from ghostmask.masks.masked import PRUNABLE, FixedMask, Masked
from ghostmask.masks.methods.gmp import Settings as GmpSettings
from ghostmask.masks.methods.gmp import Shrinking
from ghostmask.masks.methods.probmask import Settings as ProbMaskSettings
from ghostmask.masks.methods.probmask import relaxed_form
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.relaxed import Search
from ghostmask.masks.schedules import probability_rate
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.masks.settings import Protecting, Ranked, n_of_m
from ghostmask.masks.units.blocks import Blocks

RUNS_ONLY = "the rest is for ghostmask's own runs"
Method = Callable[[Sgd, float], Masked]
"""(rule of the dense weights, their learning rate) -> how the prunable weights are made."""


def optimizer(
    net: nn.Module,
    method: Method,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    clip: float = 0.0,
    seed: int = 0,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    place: bool = True,
) -> ShardedOptimizer:
    """SGD on all trained parameters of `net`, the prunable ones under `method`'s mask.

    method: `probmask(...)`, `gmp(...)` or `fixed(...)`. clip: largest joint gradient norm, 0 = none. seed: of the
    noise. only, exclude: patterns (fnmatch) of parameter names that are pruned, that are not. place: False where
    DeepSpeed is to hold the parameters (`ghostmask.initialize`). What has requires_grad=False is neither trained nor
    pruned. Raises InputError where nothing is left to prune.
    """
    require_number("lr", lr, 0, above=True)
    rule = Sgd(momentum, weight_decay, nesterov)
    weights = _trained_weights(net, only, exclude)
    pruned = {id(w) for w in weights.values()}
    others = {n: p for n, p in net.named_parameters() if id(p) not in pruned and p.requires_grad}
    groups = [ParameterGroup(PRUNABLE, weights, method(rule, lr), lr)]
    if others:
        groups.append(ParameterGroup("other", others, Plain({"weight": rule}), lr))
    return ShardedOptimizer(groups, clip=clip, sampling=Sampling(seed), placement=WholePlacement if place else None)


def probmask(
    density: float, steps: int, *, lr: float = 0.0, steps_per_epoch: int = 1, constraint: str = "global",
    temperature_end: float = 0.03, start_fraction: float = 0.16, end_fraction: float = 0.6, train_weights: bool = True,
    granularity: str = "weight", seed: int = 0,
) -> Method:  # fmt: skip
    """ProbMask: a probability for every weight, trained with Adam at `lr` under sum(s) <= density n.

    steps: optimizer steps of the whole search; its schedules move every steps_per_epoch of them. What decides the
    probabilities is lr x steps: lr = 0 is 41 / steps, at least the paper's 6e-3 and at most 0.12. granularity: weight
    or N:M. seed: of ties. Raises InputError.
    """
    settings = ProbMaskSettings(  # raises what the setting of that name would
        density=density, lr=lr, constraint=constraint, temperature_end=temperature_end, start_fraction=start_fraction,
        end_fraction=end_fraction, granularity=granularity,
    )  # fmt: skip
    epochs = max(1, steps // steps_per_epoch)
    settings.require_fall("steps", steps, settings.falls, steps_per_epoch)
    start, end = settings.window(int, epochs)
    search = Search(settings.density, constraint, temperature_end, start, end, epochs, steps_per_epoch, seed)
    relative, units = lr or probability_rate(steps), _blocks(settings)
    return lambda rule, rate: relaxed_form(search, rule if train_weights else None, relative / rate, units)


def gmp(
    density: float, steps: int, *, every: int = 100, start_fraction: float = 0.16, end_fraction: float = 0.6,
    constraint: str = "global", granularity: str = "weight", seed: int = 0,
) -> Method:  # fmt: skip
    """Gradual magnitude pruning: the largest |w| stay, chosen anew every `every` of `steps` steps. granularity: weight
    or N:M. Raises InputError."""
    settings = GmpSettings(
        density=density, constraint=constraint, update_every=every, start_fraction=start_fraction,
        end_fraction=end_fraction, granularity=granularity,
    )  # fmt: skip
    settings.require_fall("steps", steps, settings.falls)
    first, last = settings.window(round, steps)
    budget = Budget(settings.density, constraint, seed=seed, units=_blocks(settings))
    return lambda rule, _: Shrinking(rule, budget, first, last, every)


def fixed(masks: Mapping[str, Tensor]) -> Method:
    """A given mask: bool tensors by parameter name, one for each prunable weight (else `optimizer` raises
    InputError)."""
    return lambda rule, _: FixedMask(rule, masks)


def magnitude_masks(
    net: nn.Module, density: float, *, constraint: str = "global", min_per_layer: int = 0, only: Sequence[str] = (),
    exclude: Sequence[str] = (), granularity: str = "weight",
) -> dict[str, Tensor]:  # fmt: skip
    """Masks of exactly round(density n) of the network's largest |w|: one-shot pruning, to train on with `fixed`.

    granularity: weight, kernel or N:M (see docs/budgets.md). What has requires_grad=False is left out. Raises
    InputError.
    """
    settings = Protecting(
        density=density, constraint=constraint, min_per_layer=min_per_layer, granularity=granularity
    )  # fmt: skip
    if granularity == "channel":
        raise bad_value("granularity", granularity, f"give weight, kernel or N:M; {RUNS_ONLY}")
    weights = _trained_weights(net, only, exclude)
    part = Slice.even(weights, single(next(iter(weights.values())).device))
    with torch.no_grad():
        units = units_of(settings, net, weights, None, dict)
        budget = Budget(settings.density, constraint, min_per_layer, units=units)
        return part.gathered(largest(part, part.cut(weights).abs(), budget))


def initialize(model: nn.Module, optimizer: ShardedOptimizer, config: dict[str, Any]) -> Any:
    """Collective: `deepspeed.initialize` for an optimizer that was made with place=False; returns the engine.

    config: DeepSpeed's, ZeRO stage 0, 1 or 2, float32; clipping is the optimizer's (`clip`). Raises InputError for
    another one. torch.distributed must be initialised, or `deepspeed.init_distributed()` called, before.
    """
    from ghostmask.engine.sharding.zero import initialize as with_deepspeed

    if config.get("zero_optimization", {}).get("stage", 0) not in (0, 1, 2):
        raise bad_value("zero_optimization", config["zero_optimization"], "use stage 0, 1 or 2")
    if config.get("gradient_clipping"):
        raise bad_value("gradient_clipping", config["gradient_clipping"], "give ghostmask.optimizer(clip=...) instead")
    for name in ("fp16", "bf16", "bfloat16"):
        if config.get(name, {}).get("enabled"):
            raise bad_value(name, config[name], "weights are kept in float32; use torch.autocast in the forward pass")
    device = next(model.parameters()).device
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
    world = World(rank, size, device, group)
    return with_deepspeed(model, optimizer, config, world)


def _blocks(settings: Ranked) -> Blocks | None:
    """Of granularity N:M, which needs to know nothing of the network. Raises InputError for kernels and channels."""
    if block := n_of_m(settings.granularity):
        return Blocks(*block)
    if settings.granularity != "weight":
        raise bad_value("granularity", settings.granularity, f"give weight or N:M; {RUNS_ONLY}")
    return None


def _trained_weights(net: nn.Module, only: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    weights = {n: w for n, w in prunable_weights(net, tuple(exclude), tuple(only)).items() if w.requires_grad}
    if not weights:
        raise InputError("none of the prunable weights is trained: requires_grad is False on all of them")
    return weights
