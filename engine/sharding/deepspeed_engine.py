"""Hands a module and its parameter groups to DeepSpeed, and says which elements this rank then owns."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from ghostmask.engine.sharding.optimizer import ParameterGroup, ProjectedOptimizer
from ghostmask.engine.sharding.shards import Shard, flatten_parameters, zero_shard
from ghostmask.engine.world import World

REDUCE_ELEMENTS = 8_000_000
"""Gradients are reduced in buckets of at most this many elements (32 MB): the first ones while backward still runs."""
GATHER_ELEMENTS = 50_000_000
"""Updated parameters are gathered in pieces of at most this many elements; nothing is left to overlap with."""


@dataclass(frozen=True)
class GroupState:
    """A parameter group on this rank: its shard's values, optimizer state per tensor, updates made, last rate."""

    tensor: Tensor
    states: list[dict[str, Tensor]]
    updates: int
    lr: float


@dataclass(frozen=True)
class ShardedEngine:
    """A DeepSpeed engine, its client optimizer, and one Shard per parameter group, in the groups' order."""

    engine: Any
    optimizer: ProjectedOptimizer
    shards: tuple[Shard, ...]
    zero_stage: int

    def state_of(self, group_index: int) -> dict[str, Tensor]:
        """The optimizer state of a group's shard: name -> (n,) float32, laid out like the shard's tensor.

        Only under ZeRO, where the shard is one parameter of the optimizer.
        """
        (flat,) = self.optimizer.param_groups[group_index]["params"]
        return dict(self.optimizer.state[flat])

    def group_state(self, group_index: int) -> GroupState:
        """Copies of what this rank's optimizer holds for a group, to give to another engine for the same group."""
        group = self.optimizer.param_groups[group_index]
        states = [{name: t.clone() for name, t in self.optimizer.state[p].items()} for p in group["params"]]
        return GroupState(self.shards[group_index].tensor.clone(), states, group["updates"], group["lr"])

    def load_group_state(self, group_index: int, kept: GroupState) -> None:
        """Take over what `group_state` gave, where world size and ZeRO stage are the same."""
        group = self.optimizer.param_groups[group_index]
        self.shards[group_index].tensor.copy_(kept.tensor)
        for param, states in zip(group["params"], kept.states, strict=True):
            for name, tensor in states.items():
                self.optimizer.state[param][name].copy_(tensor)
        group["updates"], group["lr"] = kept.updates, kept.lr

    def publish(self) -> None:
        """Collective: after the shards were changed by hand (a resume), give every rank the whole parameters."""
        if self.zero_stage > 0:
            self.engine.optimizer.update_lp_params()

    def step(self) -> bool:
        """Collective: the last microstep's end; False, with nothing updated, when a gradient is not finite.

        ZeRO looks at the gradients itself; the plain optimizer of stage 0 would apply them.
        """
        if self.zero_stage == 0:
            grads = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
            if not bool(torch.nn.utils.get_total_norm(grads).isfinite()):
                return False
        self.engine.step()
        return not getattr(self.engine.optimizer, "overflow", False)

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers, so that another engine can be made for the same parameters."""
        self.engine.destroy()


def shard_model(
    module: nn.Module, groups: list[ParameterGroup], world: World, *, zero_stage: int, micro_batch: int,
    microsteps: int, clip: float,
) -> ShardedEngine:  # fmt: skip
    """Collective: a DeepSpeed engine over `module` whose optimizer updates `groups`.

    micro_batch: images per rank and forward pass; microsteps: forward passes per optimizer step (the gradients are
    averaged over them); clip: largest joint gradient norm over all groups, 0 = none.
    """
    deepspeed_logger.setLevel(logging.ERROR)
    # On the CPU DeepSpeed would compile a shared-memory all-reduce (minutes, needs ninja) that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = ProjectedOptimizer(groups)
    flat = [flatten_parameters(g.parameters) for g in groups] if zero_stage == 0 else []
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, dist_init_required=False,
        config=_settings(world, zero_stage, micro_batch, microsteps, clip),
    )  # fmt: skip
    if zero_stage == 0:
        shards = tuple(flat)
    else:
        _send_as_bf16(engine.sharding.optimizer, [p for g in groups if g.bf16_gradients for p in g.parameters.values()])
        partitions = engine.optimizer.single_partition_of_fp32_groups
        shards = tuple(
            zero_shard(g.parameters, part, world.rank, world.size) for g, part in zip(groups, partitions, strict=True)
        )
    optimizer.allocate_state()
    for group, shard in zip(optimizer.param_groups, shards, strict=True):
        group["shard"] = shard
    return ShardedEngine(engine, optimizer, shards, zero_stage)


def _send_as_bf16(zero: Any, parameters: list[nn.Parameter]) -> None:
    """Reduce the gradients of these parameters as bfloat16, in buckets of their own.

    DeepSpeed's `communication_data_type` is one type for all gradients; its buckets are kept per type all the same (for
    torch_autocast, which would change the forward pass too), and asking for a parameter's type is a method of its own.
    The mean over ranks is divided in float32 before, and added to float32 after.
    """
    if not parameters:
        return
    chosen, usual = {id(p) for p in parameters}, zero.communication_data_type
    bucket = type(zero.ipg_buckets[usual])
    zero.ipg_buckets[torch.bfloat16] = bucket()
    zero.get_param_comm_dtype = lambda param: torch.bfloat16 if id(param) in chosen else usual


def _settings(world: World, zero_stage: int, micro_batch: int, microsteps: int, clip: float) -> dict[str, Any]:
    return {
        "train_batch_size": micro_batch * microsteps * world.size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": microsteps,
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": world.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": REDUCE_ELEMENTS,
            "allgather_bucket_size": GATHER_ELEMENTS,
        },
        # Our optimizer is one DeepSpeed has not seen; it is only ever called on the slices, which is all it needs.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
