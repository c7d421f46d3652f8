"""DeepSpeed's part: its engine runs the loop, its ZeRO holds and gathers the parameters; we reduce and update.

What DeepSpeed 0.19.8 would do at stages 1 and 2: all-reduce whole buckets and keep a part (3N bytes with the gather
where 2N do), keep a float32 copy of the parameters (ours is the state), call the optimizer once per bucket (the joint
norm and the constraint need all of them), and wait for the device to look at the norm. `SlicedZero` overrides those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from ghostmask.engine.sharding.optimizer import Sampling, ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup, WholePlacement, is_own_state
from ghostmask.engine.sharding.reducer import BucketReducer
from ghostmask.engine.sharding.slices import Layout, Run, Slice, bucketed
from ghostmask.engine.world import World

BUCKET_ELEMENTS = 6_000_000
"""Gradients leave in buckets of about so many elements (24 MB in float32): the first while backward still runs."""
ALIGN = 2
"""DeepSpeed pads a rank's part to multiples of this many elements."""


class SlicedZero(DeepSpeedZeroOptimizer):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's ZeRO optimizer with reduce-scattered buckets and a ShardedOptimizer in the place of its update.

    Not constructed: `initialize` turns the object that DeepSpeed has made into one of these.
    """

    sharded: ShardedOptimizer
    reducer: BucketReducer

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """DeepSpeed, from autograd: the gradient of a parameter of bucket i is there."""
        position: int = param.param_idx_in_group  # type: ignore[attr-defined]
        assert param.grad is not None
        self.reducer.add(i, position, param.grad, sending=self._sending())
        param.grad = None

    def backward_epilogue(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed: a backward pass is over."""
        self.reducer.end_backward(sending=self._sending())

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stage 1, and below stage 2: nothing is left to do, `backward_epilogue` sees to it."""

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """See `reduce_gradients`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Collective: DeepSpeed: the gradients of all microbatches are there."""
        self.sharded.step()

    def _sending(self) -> bool:
        return bool(self.is_gradient_accumulation_boundary())


class ZeroPlacement:
    """Groups whose parameters ZeRO holds: this rank owns a part of each bucket (a DeepSpeed parameter group)."""

    def __init__(
        self, zero: SlicedZero, groups: Sequence[ParameterGroup], layouts: Sequence[Layout], world: World,
        originals: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """originals: float32 values, by "group/name", of parameters that were cast for the network."""
        self._zero, self._groups, self._originals, self._world = zero, groups, dict(originals), world
        self.slices = [Slice(layout, world) for layout in layouts]
        self._first = [sum(len(x.buckets) for x in layouts[:i]) for i in range(len(layouts))]
        for i, partition in enumerate(zero.parallel_partitioned_bit16_groups):
            assert partition[world.rank].numel() == self._buckets()[i].share
        # DeepSpeed's own float32 copy: the state takes its place.
        for parameters in zero.bit16_groups:
            for p in parameters:
                p._hp_mapping = None
        zero.single_partition_of_fp32_groups = [torch.empty(0) for _ in zero.bit16_groups]

    def initial(self, group: int) -> Tensor:
        owned = self.outputs(group)
        casted = {
            n: self._originals.pop(f"{self._groups[group].name}/{n}", None) for n in self._groups[group].parameters
        }
        if all(value is not None for value in casted.values()):
            return self.slices[group].cut(casted)  # type: ignore[arg-type]
        if len(owned) == 1 and is_own_state(self._groups[group]):
            return owned[0][1]
        if not owned:
            return torch.zeros(0, device=self._world.device)
        return torch.cat([out.float() for _, out in owned])

    def outputs(self, group: int) -> list[tuple[Run, Tensor]]:
        found = []
        for i, run in enumerate(self.slices[group].runs, self._first[group]):
            if run.numel:
                found.append((run, self._zero.parallel_partitioned_bit16_groups[i][self._world.rank][: run.numel]))
        return found

    def gradient(self, group: int) -> Tensor:
        parts = [
            self._zero.reducer.result(i)[: run.numel]
            for i, run in enumerate(self.slices[group].runs, self._first[group])
        ]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        return flat.div_(self._world.size) if self._world.size > 1 else flat

    def publish(self) -> None:
        self._zero.reducer.clear()
        if self._world.size > 1:
            all_gather_dp_groups(
                groups_flat=self._zero.bit16_groups_flat,
                partitioned_param_groups=self._zero.parallel_partitioned_bit16_groups,
                dp_process_group=self._zero.real_dp_process_group,
                start_alignment_factor=self._zero.nccl_start_alignment_factor,
                allgather_bucket_size=self._zero.allgather_bucket_size,
            )

    def _buckets(self) -> list[Any]:
        return [bucket for part in self.slices for bucket in part.layout.buckets]


class ReplicatedPlacement(WholePlacement):
    """Stage 0: every rank holds everything; gradients are added up in the tree's order, and gathered."""

    def __init__(self, groups: Sequence[ParameterGroup], world: World, order: Sequence[int], *, several: bool) -> None:
        super().__init__(groups)
        self._world = world
        self._reducer = BucketReducer(world, order, several=several)
        self._hooks: list[Any] = []
        for number, group in enumerate(groups):
            parameters = list(group.parameters.values())
            share = -(-sum(p.numel() for p in parameters) // world.size)
            self._reducer.add_bucket([p.numel() for p in parameters], share, torch.float32)
            for position, p in enumerate(parameters):
                if p.requires_grad:
                    register: Any = p.register_post_accumulate_grad_hook
                    self._hooks.append(register(self._taker(number, position)))
        self._reducer.set_leaving(range(len(groups)))
        self._reduced = False

    def gradient(self, group: int) -> Tensor:
        if not self._reduced:
            self._reducer.end_backward(sending=True)
            self._reduced = True
        own, numel = self._reducer.result(group), self.slices[group].numel
        if self._world.size == 1:
            return own[:numel]
        whole = torch.empty(own.numel() * self._world.size, dtype=own.dtype, device=own.device)
        dist.all_gather_into_tensor(whole, own, group=self._world.group)
        return whole[:numel].div_(self._world.size)

    def publish(self) -> None:
        self._reducer.clear()
        self._reduced = False

    def release(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _taker(self, number: int, position: int) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._reducer.add(number, position, parameter.grad, sending=False)
            parameter.grad = None

        return take


@dataclass(frozen=True)
class ShardedEngine:
    """A DeepSpeed engine and the optimizer behind it."""

    engine: Any
    optimizer: ShardedOptimizer

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers, so that another engine can be made for the same parameters."""
        if isinstance(self.optimizer.placement, ReplicatedPlacement):
            self.optimizer.placement.release()
        self.engine.destroy()


class _Group:
    """What DeepSpeed calls mpu: the ranks among which parameters are shared out and gradients are averaged."""

    def __init__(self, world: World) -> None:
        self._world = world

    def get_data_parallel_group(self) -> Any:
        return self._world.group

    def get_data_parallel_rank(self) -> int:
        return self._world.rank

    def get_data_parallel_world_size(self) -> int:
        return self._world.size

    def get_model_parallel_group(self) -> Any:
        return None

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def shard_model(
    module: nn.Module, groups: Sequence[ParameterGroup], world: World, *, zero_stage: int, micro_batch: int,
    microsteps: int, clip: float, sampling: Sampling | None = None, order: Sequence[int] | None = None,
) -> ShardedEngine:  # fmt: skip
    """Collective: a DeepSpeed engine over `module` whose parameters in `groups` are trained by a ShardedOptimizer.

    world: the ranks that share the groups (those of one noise group); order: these by the parts that they compute.
    micro_batch: images per rank and forward pass; microsteps: forward passes per `engine.step` (the gradients are
    averaged over them).
    """
    config = _settings(world, zero_stage, micro_batch, microsteps)
    optimizer = ShardedOptimizer(groups, clip=clip, sampling=sampling, placement=None)
    # Always named: DeepSpeed keeps what an engine before this one was given.
    mpu = _Group(world) if world.group is not None else None
    engine = initialize(module, optimizer, config, world, mpu=mpu, order=order)
    return ShardedEngine(engine, optimizer)


def initialize(
    module: nn.Module, optimizer: ShardedOptimizer, config: dict[str, Any], world: World, *, mpu: Any = None,
    order: Sequence[int] | None = None,
) -> Any:  # fmt: skip
    """Collective: `deepspeed.initialize` for a ShardedOptimizer that has no placement yet; returns the engine.

    config: DeepSpeed's, ZeRO stage 0, 1 or 2, without clipping (which is the optimizer's) and without fp16 or bf16
    modes; order: the ranks of `world` in the order of the parts that they compute.
    """
    deepspeed_logger.setLevel(logging.ERROR)
    # On the CPU DeepSpeed would compile a shared-memory all-reduce (minutes, needs ninja) that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world.device.type == "cpu" and get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())  # else it moves the network to a GPU, if there is one
    stage = config.get("zero_optimization", {}).get("stage", 0)
    groups, whole = optimizer.groups, optimizer.param_groups
    layouts = [Layout(g.shapes, world.size, BUCKET_ELEMENTS if world.size > 1 else 0, ALIGN) for g in groups]
    originals: dict[str, Tensor] = {}
    if stage > 0:
        originals = _cast(groups)
        optimizer.param_groups = _as_buckets(groups, layouts, whole)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False, mpu=mpu
    )
    optimizer.param_groups = whole
    several = engine.gradient_accumulation_steps() > 1
    if stage == 0:
        engine.enable_backward_allreduce = False
        optimizer.place(ReplicatedPlacement(groups, world, order or range(world.size), several=several))
        return engine
    zero = engine.optimizer
    zero.__class__ = SlicedZero
    zero.sharded, zero.optimizer = optimizer, optimizer
    zero.reducer = BucketReducer(world, order or range(world.size), several=several)
    shares = iter(zero.partition_size)
    for layout, group in zip(layouts, groups, strict=True):
        for names in bucketed(list(group.parameters), layout):
            members = [group.parameters[n] for n in names]
            zero.reducer.add_bucket([p.numel() for p in members], next(shares), members[0].dtype)
    zero.reducer.set_leaving(_leaving_order(module, zero.bit16_groups))
    optimizer.place(ZeroPlacement(zero, groups, layouts, world, originals))
    return engine


def _cast(groups: Sequence[ParameterGroup]) -> dict[str, Tensor]:
    """Turn the parameters of groups that travel as bfloat16 into it; their float32 values by "group/name"."""
    originals = {}
    for group in groups:
        if group.bf16:
            for name, p in group.parameters.items():
                originals[f"{group.name}/{name}"] = p.data
                p.data = p.data.bfloat16()
    return originals


def _as_buckets(
    groups: Sequence[ParameterGroup], layouts: Sequence[Layout], whole: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A DeepSpeed parameter group for each bucket: ZeRO shares out each of them over all ranks."""
    return [
        {**settings, "params": [group.parameters[n] for n in names]}
        for group, layout, settings in zip(groups, layouts, whole, strict=True)
        for names in bucketed(list(group.parameters), layout)
    ]


def _leaving_order(module: nn.Module, buckets: Sequence[Sequence[nn.Parameter]]) -> list[int]:
    """Buckets by when backward fills them: the one whose first parameter comes last in the module leaves first."""
    place = {id(p): i for i, p in enumerate(module.parameters())}
    return sorted(range(len(buckets)), key=lambda i: -min(place[id(p)] for p in buckets[i]))


def _settings(world: World, zero_stage: int, micro_batch: int, microsteps: int) -> dict[str, Any]:
    return {
        "train_batch_size": micro_batch * microsteps * world.size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": microsteps,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero_stage, "overlap_comm": False, "contiguous_gradients": True},
        # Our optimizer is one DeepSpeed has not seen; ZeRO never calls it by itself.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
