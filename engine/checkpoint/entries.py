"""Exactly what a resume needs: the tensors of a trainer under names that depend on no rank count and no ZeRO stage.

prunable.weight/layer1.0.conv1.weight             a state tensor of a group; each rank writes the piece that it owns
prunable.weight.momentum/layer1.0.conv1.weight    what its update rule keeps
prunable.threshold                                a state tensor that is whole on every rank
frozen/conv1.weight                               a parameter that is not trained
buffer/bn1.num_batches_tracked                    a buffer equal on all ranks
hook/rewind/bn1.running_mean                      a tensor that a hook must not forget
part/bn1.running_mean                             statistics of each part of the batch: (parts * numel,), part after
part
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ghostmask.engine.batchnorm import PartStatistics, statistics
from ghostmask.engine.checkpoint.files import CheckpointError
from ghostmask.engine.checkpoint.pieces import Piece
from ghostmask.engine.hooks import Hook
from ghostmask.engine.sharding.average import AVERAGE
from ghostmask.engine.sharding.optimizer import ShardedOptimizer

Entries = dict[str, Tensor | Piece]


def checkpoint_entries(
    model: nn.Module, optimizer: ShardedOptimizer, parts: PartStatistics, hooks: Sequence[Hook]
) -> Entries:
    """Everything to save, as views of the live tensors where that can be."""
    entries = _trained(optimizer) | _replicated(model, optimizer, hooks)
    return entries | {f"part/{name}": value for name, value in parts.entries().items()}


def restore(
    model: nn.Module, optimizer: ShardedOptimizer, parts: PartStatistics, hooks: Sequence[Hook],
    meta: Mapping[str, Any], load: Callable[[Entries], None], *, averages: bool = True,
) -> None:  # fmt: skip
    """Collective: fill the trainer's tensors from a checkpoint; load(entries) reads them in place. averages: whether it
    holds the moving averages; else they begin with what was read.

    Raises CheckpointError for a checkpoint of a version that laid them out otherwise.
    """
    if not isinstance(meta.get("updates"), int):
        raise CheckpointError(
            "the run's checkpoints were written by an older version, which kept other tensors: "
            "go on with that version, give another run=NAME, or --restart to start over"
        )
    statistics_here = parts.entries()
    entries = _trained(optimizer) | _replicated(model, optimizer, hooks)
    entries |= {f"part/{name}": value for name, value in statistics_here.items()}
    load(entries if averages else {name: value for name, value in entries.items() if not is_average(name)})
    parts.load(statistics_here)
    if not averages:
        optimizer.begin_averages()
        parts.begin_averages()
    optimizer.updates = int(meta["updates"])
    optimizer.refresh()


def is_average(name: str) -> bool:
    """Whether an entry is a moving average, of weights or of statistics."""
    return f".{AVERAGE}/" in name or (name.startswith("part/") and name.endswith(f".{AVERAGE}"))


def _trained(optimizer: ShardedOptimizer) -> Entries:
    entries: Entries = {}
    for group, state, part in zip(optimizer.groups, optimizer.states, optimizer.slices, strict=True):
        whole = {key: t for key, t in state.items() if key.partition(".")[0] in group.reparametrization.whole}
        sliced = {key: t for key, t in state.items() if key not in whole}
        entries |= {f"{group.name}.{key}": tensor for key, tensor in whole.items()}
        for s in part.segments:
            full = part.layout.shapes[s.name].numel()
            for key, tensor in sliced.items():
                view = tensor[s.start : s.start + s.numel]
                entries[f"{group.name}.{key}/{s.name}"] = Piece(full, s.offset, view)
    return entries


def _replicated(model: nn.Module, optimizer: ShardedOptimizer, hooks: Sequence[Hook]) -> Entries:
    trained = {id(p) for group in optimizer.groups for p in group.parameters.values()}
    entries: Entries = {f"frozen/{n}": p.detach() for n, p in model.named_parameters() if id(p) not in trained}
    local, saved = set(statistics(model)), set(model.state_dict())
    entries.update({f"buffer/{n}": b for n, b in model.named_buffers() if n not in local and n in saved})
    entries.update({f"hook/{hook.name}/{n}": t for hook in hooks for n, t in hook.tensors().items()})
    return entries
