"""Exactly what a resume needs: the tensors of a trainer under names that depend on no rank count and no ZeRO stage.

weight/layer1.0.conv1.weight             a parameter, flattened; each rank writes the piece that it owns
weight.momentum/layer1.0.conv1.weight    optimizer state of the same piece
frozen/conv1.weight                      a parameter that is not trained
buffer/mask.conv1.weight                 a buffer equal on all ranks
local/bn1.running_mean                   a buffer of each rank's own: (ranks * numel,), rank after rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghostmask.engine.batchnorm import local_buffers
from ghostmask.engine.checkpoint.pieces import Piece
from ghostmask.engine.sharding.deepspeed_engine import ShardedEngine
from ghostmask.engine.sharding.optimizer import ParameterGroup
from ghostmask.engine.sharding.shards import Shard
from ghostmask.engine.world import World

Entries = dict[str, Tensor | Piece]


def checkpoint_entries(model: nn.Module, groups: list[ParameterGroup], sharded: ShardedEngine, world: World) -> Entries:
    """Everything to save, as views of the live tensors."""
    entries = _trained(groups, sharded)
    entries.update(_replicated(model, groups))
    for name, buffer in local_buffers(model).items():
        entries[f"local/{name}"] = Piece(world.size * buffer.numel(), world.rank * buffer.numel(), buffer.reshape(-1))
    return entries


def restore(
    model: nn.Module, groups: list[ParameterGroup], sharded: ShardedEngine, world: World, meta: Mapping[str, Any],
    load: Callable[[Entries], None],
) -> None:  # fmt: skip
    """Collective: fill the trainer's tensors from a checkpoint; load(entries) reads them in place.

    Batch norm's statistics come back rank by rank on the same number of ranks; on another number every rank gets
    their mean over the ranks that saved.
    """
    saved_ranks = int(meta["world_size"])
    entries = _trained(groups, sharded)
    entries.update(_replicated(model, groups))
    rows = {name: b.new_empty(saved_ranks * b.numel()) for name, b in local_buffers(model).items()}
    entries.update({f"local/{name}": row for name, row in rows.items()})
    load(entries)
    with torch.no_grad():
        for name, buffer in local_buffers(model).items():
            per_rank = rows[name].view(saved_ranks, -1)
            own = per_rank[world.rank] if saved_ranks == world.size else per_rank.mean(0)
            buffer.copy_(own.view_as(buffer))
    for group in sharded.optimizer.param_groups:
        group["updates"] = int(meta["updates"][group["name"]])
    sharded.publish()


def _trained(groups: list[ParameterGroup], sharded: ShardedEngine) -> Entries:
    entries: Entries = {}
    for index, (group, shard) in enumerate(zip(groups, sharded.shards, strict=True)):
        for name, part, piece in _shard_pieces(group, shard, sharded, index):
            entries[f"{group.name}{part}/{name}"] = piece
    return entries


def _shard_pieces(
    group: ParameterGroup, shard: Shard, sharded: ShardedEngine, index: int
) -> Iterator[tuple[str, str, Tensor | Piece]]:
    if sharded.zero_stage == 0:
        for name, param in group.parameters.items():
            yield name, "", param.detach().view(-1)
            for state, tensor in sharded.optimizer.state[param].items():
                yield name, f".{state}", tensor.view(-1)
        return
    tensors = {"": shard.tensor, **{f".{k}": v for k, v in sharded.state_of(index).items()}}
    for segment in shard.segments:
        for part, tensor in tensors.items():
            view = tensor[segment.start : segment.start + segment.numel]
            yield segment.name, part, Piece(segment.full_numel, segment.offset, view)


def _replicated(model: nn.Module, groups: list[ParameterGroup]) -> Entries:
    trained = {id(p) for group in groups for p in group.parameters.values()}
    entries: Entries = {f"frozen/{n}": p.detach() for n, p in model.named_parameters() if id(p) not in trained}
    local, saved = set(local_buffers(model)), set(model.state_dict())
    entries.update({f"buffer/{n}": b for n, b in model.named_buffers() if n not in local and n in saved})
    return entries
