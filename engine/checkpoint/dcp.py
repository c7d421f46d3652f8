"""How do tensors and pieces go through torch.distributed.checkpoint: plans that are checked, files that are summed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner, TensorWriteData
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ghostmask.engine.atomic import read_small, sync
from ghostmask.engine.checkpoint.files import CheckpointError, Damaged, FileSum, await_files, file_sum
from ghostmask.engine.checkpoint.index import INDEX, from_json, to_json

LARGEST_INDEX = 1 << 30
"""Bytes; ResNet-50 with ProbMask on 1,024 ranks has an index of about 5 MB."""


class PlanError(CheckpointError):
    """The tensors that the ranks gave do not make one checkpoint: a mistake of the caller, not of the disk."""


def write(path: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, FileSum]:
    """Collective: write `state` into `path`, synced; returns the files that this rank wrote (rank 0: not the index).

    Every rank raises PlanError (tensors that do not fit together) or CheckpointError (disk), if any rank does.
    """
    writer = SummingWriter(path)
    try:
        _expect_single(group)
        save(dict(state), storage_writer=writer, planner=CheckedSave(), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _plain(error) from None
    return writer.files


def read(
    path: Path, state: Mapping[str, Tensor], files: Mapping[str, FileSum], group: dist.ProcessGroup | None
) -> None:  # fmt: skip
    """Collective: fill `state` in place from the checkpoint in `path`, which consists of `files`.

    Every rank raises CheckpointError, and no tensor is changed, if a name is missing or of another shape or dtype, or
    if a rank does not see a file that it has to read.
    """
    reader = IndexedReader(path, files)
    try:
        _expect_single(group)
        load(dict(state), storage_reader=reader, planner=CheckedLoad(), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _plain(error) from None


def names(path: Path) -> set[str]:
    """Of the tensors in the checkpoint in `path`. Not collective. Raises CheckpointError."""
    try:
        return set(IndexedReader(path).read_metadata().state_dict_metadata)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its {INDEX} cannot be read ({error})") from None


class IndexedReader(FileSystemReader):
    """Reads the JSON index in the place of DCP's pickle, and waits for the files that this rank reads, no others: a
    thousand ranks that look for a thousand files each would keep a file server busy for minutes."""

    def __init__(self, path: Path, files: Mapping[str, FileSum] | None = None) -> None:
        """files: of the checkpoint, by its manifest; None: all that it names is there."""
        super().__init__(path)
        self._files = files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP: what the checkpoint holds, and where."""
        self._await({INDEX})
        return from_json(read_small(Path(self.path) / INDEX, LARGEST_INDEX))

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """DCP: before any rank reads."""
        self._await({self.storage_data[item.storage_index].relative_path for item in plan.items})
        return super().prepare_local_plan(plan)

    def _await(self, names: set[str]) -> None:
        if self._files is None:
            return
        unknown = sorted(names - set(self._files))
        if unknown:
            raise CheckpointError(f"{unknown[0]} is in its index and not in its manifest")
        try:
            await_files(Path(self.path), {name: self._files[name] for name in sorted(names)})
        except Damaged as error:
            raise CheckpointError(str(error)) from None


class SummingWriter(FileSystemWriter):
    """One synced file per rank that has something to write, the checksum of what then stands in it, and the index."""

    def __init__(self, path: Path) -> None:
        # Copy-ahead 0: the staging buffers are on the CPU already, and CUDA streams have no place in this thread.
        super().__init__(path, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self.files: dict[str, FileSum] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """DCP: write this rank's items."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        try:
            done = super().write_data(plan, planner)
            names = {result.storage_data.relative_path for result in done.wait()}
            self.files = {name: file_sum(Path(self.path) / name) for name in sorted(names)}
        except Exception as error:
            # As text, because exceptions travel to rank 0 pickled, without their causes.
            raise CheckpointError(reason(error)) from None
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """DCP, on rank 0: write the index."""
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        file = Path(self.path) / INDEX
        file.write_text(to_json(metadata))
        sync(file)


class CheckedSave(DefaultSavePlanner):
    """DCP's plan, refused where ranks disagree on a tensor or leave elements of it unowned."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """DCP, on rank 0: merge the ranks' plans."""
        found: dict[str, list[TensorWriteData]] = {}
        for plan in all_plans:
            for item in plan.items:
                if item.tensor_data is None:
                    raise PlanError(f"{item.index.fqn} is not a tensor")
                found.setdefault(item.index.fqn, []).append(item.tensor_data)
        for name, parts in found.items():
            _check_tensor(name, parts)
        return super().create_global_plan(all_plans)


class CheckedLoad(DefaultLoadPlanner):
    """DCP's plan, refused with all the names that the checkpoint does not have as asked for."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """DCP: what this rank reads."""
        saved: dict[str, Any] = self.metadata.state_dict_metadata if self.metadata else {}
        wrong = [text for name, tensor in self.state_dict.items() if (text := _mismatch(name, tensor, saved.get(name)))]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise CheckpointError("; ".join(wrong[:5]) + more)
        return super().create_local_plan()


def reason(error: BaseException) -> str:
    """The cause of a failure in a few words: the operating system's where there is one behind it."""
    if isinstance(error, CheckpointError):
        return str(error)
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, OSError):
            return str(cause)
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


def _check_tensor(name: str, parts: list[TensorWriteData]) -> None:
    """Raise PlanError unless the parts are of one tensor, do not overlap (equal ones count once) and fill it."""
    kinds = {(tuple(part.size), part.properties.dtype) for part in parts}
    if len(kinds) > 1:
        raise PlanError(f"{name} differs between ranks: {sorted(f'{dtype} {size}' for size, dtype in kinds)}")
    ((size, _),) = kinds
    if len(size) != 1:
        return
    end = 0
    for start, numel in sorted({(part.chunk.offsets[0], part.chunk.sizes[0]) for part in parts}):
        if start > end:
            raise PlanError(f"{name}: no rank owns elements {end}..{start} of {size[0]}")
        if start < end:
            raise PlanError(f"{name}: several ranks own elements {start}..{min(end, start + numel)} of {size[0]}")
        end = start + numel
    if end < size[0]:
        raise PlanError(f"{name}: no rank owns elements {end}..{size[0]} of {size[0]}")


def _mismatch(name: str, tensor: Tensor, saved: Any) -> str | None:
    if not isinstance(saved, TensorStorageMetadata):
        return f"{name} is not in it"
    if saved.size != tensor.size():
        return f"{name} has shape {tuple(saved.size)} in it and {tuple(tensor.size())} here"
    if saved.properties.dtype != tensor.dtype:
        return f"{name} is {saved.properties.dtype} in it and {tensor.dtype} here"
    return None


def _plain(error: CheckpointException) -> CheckpointError:
    """One line for what DCP reports as one traceback per rank."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, PlanError):
        return PlanError(str(cause))
    return CheckpointError(f"rank {rank}: {reason(cause)}")


def _expect_single(group: dist.ProcessGroup | None) -> None:
    """Without a group DCP warns that it assumes one process: here that is so on purpose."""
    if group is None:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
