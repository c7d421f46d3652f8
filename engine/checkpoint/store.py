"""How does a run survive: sharded checkpoints, written in the background, read back on any number of ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.agree import on_all, on_main
from ghostmask.engine.atomic import read_small
from ghostmask.engine.checkpoint import dcp as checkpoint_dcp
from ghostmask.engine.checkpoint.dcp import PlanError, reason
from ghostmask.engine.checkpoint.files import (
    META,
    CheckpointError,
    Damaged,
    FileSum,
    await_files,
    begin,
    check_digests,
    checkpoints,
    merged,
    publish,
    read_manifest,
    retire,
    step_of,
)
from ghostmask.engine.checkpoint.pieces import FragmentTensor, Piece
from ghostmask.engine.errors import EXIT_NON_FINITE, FROM_CHECKPOINT, RunStopped, to_stderr
from ghostmask.engine.lease import Lease
from ghostmask.engine.world import World

__all__ = ["CheckpointError", "CheckpointStore", "Piece", "PlanError", "Saved"]

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """An intact checkpoint: its folder, the optimizer step it was saved at, and the caller's meta, in which the store
    has put "step" and "run"."""

    path: Path
    step: int
    meta: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in one folder that all ranks see.

        folder/step-00000123/    __0_0.distcp ... (one per rank that had something to write): DCP; index.json: what
                                 lies where; meta.json: the caller's, and the step and run that this is of;
                                 manifest.json: size and checksum of every file
        folder/latest            name of the newest, for people and scripts
        folder/.writing-*        a save under way, or a leftover of a killed run

    A save: main thread: copy to CPU buffers -> background thread: all values finite? DCP writes and syncs, checksums,
    still the owner? rename, `latest`, delete old ones. The background uses a gloo group of its own, so its collectives
    and the training's cannot mix; every public method waits for it first, so neither can two users of that group.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        keep: int = 2,
        asynchronous: bool = True,
        warn: Callable[[str], None] = to_stderr,
        lease: Lease | None = None,
        run: str = "",
    ) -> None:
        """Collective. keep: newest intact checkpoints that stay; asynchronous: save() returns before the disk is done.

        warn: gets one line on rank 0 when a save failed or a checkpoint is damaged; may be called from the background.
        lease: rank 0's, of the folder that `folder` lies in; nothing is published without it. run: identity of the run,
        kept in each checkpoint; those of another run are not taken for this one's ("": any).
        """
        self.folder, self.run = folder, run
        self.failures = 0
        """Saves that failed since the last one that did not."""
        self._lease = lease
        self._keep = keep
        self._asynchronous = asynchronous
        self._warn = warn
        group: Any = dist.new_group(backend="gloo") if world.group is not None else None
        self._group: dist.ProcessGroup | None = group
        self._peers = dataclasses.replace(world, device=torch.device("cpu"), group=self._group)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._damaged: set[str] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor | Piece], meta: Mapping[str, Any]) -> None:
        """Collective: write the values that `tensors` and `meta` have now as the checkpoint of `step`.

        tensors: name -> replicated tensor (equal on every rank) or this rank's Piece; a rank may leave a name out whose
        elements others own. meta: JSON-able, equal on every rank. Waits for the save before, copies, and (when
        asynchronous) returns. A failing disk is reported through warn and changes nothing else. Raised on every rank,
        here or in the next call: PlanError for tensors that leave elements unowned, RunStopped for values that are not
        finite, and where another process owns the folder.
        """
        text = json.dumps({**meta, "step": step, "run": self.run}, indent=1)
        self.wait()
        state = self._stage(tensors)
        self._failure = None
        # Not a daemon: an interpreter that ends under a thread inside C++ aborts; so it waits for the save instead.
        self._thread = threading.Thread(target=self._save, args=(step, state, text), name="checkpoint")
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def wait(self) -> bool:
        """Collective: the save under way, if any, is over; False if the last one failed. Raises as save does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if isinstance(self._failure, PlanError | RunStopped):
                raise self._failure
        return self._failure is None

    @property
    def lost(self) -> bool:
        """On rank 0, true once it is known that another process owns the folder. Not collective."""
        return self._lease is not None and self._lease.lost

    def check_owner(self) -> None:
        """Collective: raises NotOwner on every rank where another process owns the folder."""
        self.wait()
        lease = self._lease
        self._on_main(lambda: lease.check() if lease else None)

    def latest(self) -> Saved | None:
        """Collective: the newest intact checkpoint, after a warning for each damaged one above it; None if none exists.

        Every file is read and its checksum compared, the files spread over the ranks. Raises CheckpointError, with the
        folder as it was, where checkpoints exist and none is intact.
        """
        self.wait()
        problems: dict[str, str] = {}
        while True:
            there = self._on_main(lambda: checkpoints(self.folder))
            left = [path for path in there if path.name not in problems]
            if not left:
                break
            saved, problem = self._examine(left[0])
            if saved is not None:
                return saved
            if not self._on_main(partial(os.path.lexists, left[0])):
                continue  # a run that goes on has retired it: there is a newer one
            self._damaged.add(left[0].name)
            problems[left[0].name] = problem
            self._report(f"checkpoint {left[0]} is damaged ({problem}); using the one before it, if there is one")
        if not problems:
            return None
        texts = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise CheckpointError(
            f"{self.folder}: none of its {len(problems)} checkpoints is intact ({texts}); "
            "nothing was changed: restore one from a copy, or start the run over"
        )

    def every(self) -> list[Saved]:
        """Collective: the intact checkpoints, oldest first, after a warning for each damaged one."""
        self.wait()
        found = []
        for path in reversed(self._on_main(lambda: checkpoints(self.folder))):
            saved, problem = self._examine(path)
            if saved is not None:
                found.append(saved)
            elif self._on_main(partial(os.path.lexists, path)):
                self._report(f"checkpoint {path} is damaged ({problem}); it is left out")
        return found

    def load(self, saved: Saved, tensors: Mapping[str, Tensor | Piece]) -> None:
        """Collective: fill `tensors` in place, whatever the ranks and pieces were when they were saved.

        Raises CheckpointError on every rank, with no tensor changed, that names what is missing or of another shape or
        dtype in the checkpoint. What the checkpoint has beyond `tensors` is ignored.
        """
        self.wait()
        self._peers.pulse.enter(f"reading {saved.path}")
        try:
            files = self._on_main(lambda: read_manifest(saved.path))
            state = {name: _as_dcp(value) for name, value in tensors.items()}
            checkpoint_dcp.read(saved.path, state, files, self._group)
        except CheckpointError as error:
            raise CheckpointError(f"{saved.path}: {error}") from None

    def names(self, saved: Saved) -> set[str]:
        """Collective: of all tensors that a checkpoint holds. Raises CheckpointError where it cannot be read."""
        self.wait()
        return self._on_main(lambda: checkpoint_dcp.names(saved.path))

    def close(self) -> None:
        """Collective: wait for the save under way and give back its group and buffers; reports instead of raising."""
        try:
            self.wait()
        except (PlanError, RunStopped) as error:
            self._report(str(error))
        self._buffers.clear()
        if self._group is not None and dist.GroupMember.WORLD is not None:
            dist.destroy_process_group(self._group)
        self._group = None

    def _stage(self, tensors: Mapping[str, Tensor | Piece]) -> dict[str, Tensor]:
        """Copies in CPU buffers (pinned for CUDA tensors) that stay allocated from one save to the next."""
        buffers: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        streams: set[torch.cuda.Stream] = set()
        for name, value in tensors.items():
            source = (value.tensor if isinstance(value, Piece) else value).detach()
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=source.is_cuda)
            buffers[name] = buffer.copy_(source, non_blocking=source.is_cuda)
            state[name] = _as_dcp(Piece(value.full_numel, value.start, buffer) if isinstance(value, Piece) else buffer)
            if source.is_cuda:
                streams.add(torch.cuda.current_stream(source.device))
        for stream in streams:
            stream.synchronize()
        self._buffers = buffers
        return state

    def _save(self, step: int, state: dict[str, Tensor], meta: str) -> None:
        """Background: the whole save; on any failure the hidden folder goes and everybody knows."""
        writing: Path | None = None
        try:
            self._agree(lambda: _check_finite(step, self._buffers))
            writing = self._on_main(lambda: self._begin(step))
            files = merged(self._peers.all_gather_object(checkpoint_dcp.write(writing, state, self._group)))
            self._on_main(lambda: self._publish(writing, step, meta, files))
            self.failures = 0
        except Exception as error:
            self._failure, self.failures = error, self.failures + 1
            self._abandon(writing, agreed=isinstance(error, CheckpointError | RunStopped))
            if not isinstance(error, PlanError | RunStopped):
                self._report(f"the checkpoint of step {step} could not be saved in {self.folder}: {reason(error)}")

    def _begin(self, step: int) -> Path:
        if self._lease is not None:
            self._lease.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        return begin(self.folder, step)

    def _publish(self, writing: Path, step: int, meta: str, files: dict[str, FileSum]) -> None:
        await_files(writing, files)
        try:
            if self._lease is not None:
                self._lease.check()
            newest = publish(writing, step, meta, files)
        except OSError:
            if self._lease is not None:  # who takes a folder over removes what is half-written in it
                self._lease.check()
            raise
        try:
            retire(newest, self._keep, self._damaged)
        except OSError as error:
            self._report(f"an old checkpoint in {self.folder} could not be deleted: {error}")

    def _abandon(self, writing: Path | None, agreed: bool) -> None:
        """Remove the hidden folder; where all ranks know of the failure, none goes on before it is gone."""
        if writing is not None and self._peers.is_main:
            shutil.rmtree(writing, ignore_errors=True)
        if agreed:
            with suppress(RuntimeError):  # a peer that died meanwhile
                self._peers.barrier()

    def _examine(self, path: Path) -> tuple[Saved | None, str]:
        """Collective: (the checkpoint, "") or (None, what is wrong with it)."""
        self._peers.pulse.enter(f"verifying {path}")
        try:
            files, meta = self._on_main(lambda: (read_manifest(path), json.loads(read_small(path / META))))
            mine = sorted(files)[self._peers.rank :: self._peers.size]
            self._agree(lambda: _check(path, {name: files[name] for name in mine}))
            if meta.get("step") != step_of(path):
                return None, f"it is the checkpoint of step {meta.get('step')}, under another's name"
            if self.run and meta.get("run") != self.run:
                return None, f"it is a checkpoint of another run, {meta.get('run') or 'without a name'}"
            return Saved(path, step_of(path), meta), ""
        except (CheckpointError, ValueError) as error:
            return None, str(error)

    def _on_main(self, action: Callable[[], T]) -> T:
        """Collective: rank 0's action(), its result on every rank; its failure a CheckpointError on every rank."""
        return on_main(self._peers, action, CheckpointError, _in_words)

    def _agree(self, action: Callable[[], None]) -> None:
        """Collective: every rank's action(); one rank's failure is a CheckpointError on every rank."""
        on_all(self._peers, action, CheckpointError, _in_words)

    def _report(self, text: str) -> None:
        if self._peers.is_main:
            self._warn(text)


def _as_dcp(value: Tensor | Piece) -> Tensor:
    return FragmentTensor(value) if isinstance(value, Piece) else value


def _check(path: Path, files: dict[str, FileSum]) -> None:
    await_files(path, files)
    check_digests(path, files)


def _check_finite(step: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise RunStopped for a value that is not finite: a run that goes on from it is lost, and the last checkpoint
    before it would be deleted."""
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise RunStopped(
            f"{bad[0]}{more} is not finite at step {step}: no checkpoint was made of it; {FROM_CHECKPOINT}",
            EXIT_NON_FINITE,
        )


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, Damaged) else reason(error)
