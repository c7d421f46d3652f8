"""How does a checkpoint folder appear whole or not at all, and how is damage found: names, checksums, renames."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ghostmask.engine.atomic import read_small, sync
from ghostmask.engine.checkpoint.index import INDEX
from ghostmask.engine.errors import InputError

META = "meta.json"
MANIFEST = "manifest.json"
POINTER = "latest"
"""Text file with the name of the newest folder: for people and scripts. Reading trusts folders and checksums only."""
WRITING = ".writing-"
DELETING = ".deleting-"
FORMAT = 2

_STEP = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_READ_BYTES = 1 << 22


class CheckpointError(InputError):
    """A checkpoint that cannot be used, or tensors that cannot make one: names the folder, the cause and the fix."""


class Damaged(Exception):
    """This checkpoint is not what was written; says in a few words why."""


class FileSum(NamedTuple):
    """Size in bytes and blake2b-128 of a file."""

    size: int
    digest: str


def checkpoints(folder: Path) -> list[Path]:
    """What has a checkpoint's name in `folder`, newest first, damaged or not; [] where there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if os.path.lexists(folder):
            raise  # a link to what is not there, such as a disk that is not mounted: not a folder without checkpoints
        return []
    return [folder / name for name in sorted(filter(_STEP.fullmatch, names), key=_order, reverse=True)]


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint folder is named after."""
    return _order(path.name)[0]


def file_sum(path: Path) -> FileSum:
    """Size and digest of a file's present content."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileSum(size, digest.hexdigest())


def read_manifest(path: Path) -> dict[str, FileSum]:
    """Name -> FileSum of the files of checkpoint `path`. Raises Damaged unless manifest and file sizes are right."""
    try:
        content = json.loads(read_small(path / MANIFEST))
        if isinstance(content, dict) and content.get("format") == 1:
            raise Damaged("it was written by an older version of ghostmask, which kept other tensors")
        files = {str(name): FileSum(int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        sealed = content["format"] == FORMAT and content["seal"] == _seal(files)
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} is not readable") from None
    if not sealed or not {INDEX, META} <= set(files):
        raise Damaged(f"{MANIFEST} is corrupt")
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        if size != expected.size:
            raise Damaged(f"{name} has {size} bytes instead of {expected.size}")
    return files


def await_files(path: Path, files: dict[str, FileSum], patience_s: float = 60.0) -> None:
    """Return once this machine sees every file at its size; raises Damaged after patience_s.

    Network file systems show another machine's files late (attribute caches: seconds).
    """
    end = time.monotonic() + patience_s
    for name, expected in files.items():
        while True:
            try:
                if (path / name).stat().st_size == expected.size:
                    break
            except FileNotFoundError:
                pass
            if time.monotonic() > end:
                raise Damaged(f"{path / name} is not visible here: all ranks must share the checkpoint folder")
            time.sleep(0.05)


def check_digests(path: Path, files: dict[str, FileSum]) -> None:
    """Read `files` of checkpoint `path` in full. Raises Damaged at the first that is not as written."""
    for name, expected in files.items():
        if file_sum(path / name) != expected:
            raise Damaged(f"{name} fails its checksum")


def begin(folder: Path, step: int) -> Path:
    """A new hidden folder to write the checkpoint of `step` in; removes leftovers of killed runs."""
    clear_unfinished(folder)
    writing = folder / f"{WRITING}step-{step:08d}-{uuid.uuid4().hex[:8]}"
    writing.mkdir()
    return writing


def clear_unfinished(folder: Path) -> None:
    """Remove what was being written or deleted in `folder`: only its owner may. A process that lost the folder, and
    still writes there, cannot give its half-written folder a checkpoint's name any more."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name.startswith((WRITING, DELETING)):
            shutil.rmtree(entry.path, ignore_errors=True)


def publish(writing: Path, step: int, meta: str, files: dict[str, FileSum]) -> Path:
    """Turn the hidden folder into the checkpoint of `step`, in one rename.

    files: what the ranks wrote and synced. A second checkpoint of the same step gets a revision number behind its
    name, and so counts as the newer one, at no instant without the first.
    """
    folder = writing.parent
    _write_synced(writing / META, meta.encode())
    files = {**files, META: file_sum(writing / META), INDEX: file_sum(writing / INDEX)}
    manifest = {"format": FORMAT, "files": files, "seal": _seal(files)}
    _write_synced(writing / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync(writing)
    revisions = [_order(path.name)[1] for path in checkpoints(folder) if step_of(path) == step]
    name = f"step-{step:08d}" + (f".{max(revisions) + 1}" if revisions else "")
    # All that needs space on the disk happens before the rename: after it, only renames are left.
    pointer = folder / f".{POINTER}-new"
    _write_synced(pointer, f"{name}\n".encode())
    writing.rename(folder / name)
    sync(folder)
    with suppress(IsADirectoryError):  # what somebody put there; nothing of ours reads it
        pointer.replace(folder / POINTER)
    sync(folder)
    return folder / name


def retire(newest: Path, keep: int, damaged: Collection[str]) -> None:
    """Delete what lies behind the last `keep` checkpoints.

    Those named in `damaged`, or whose sizes are wrong, do not count; neither do earlier saves of the same step.
    """
    kept: dict[int, Path] = {step_of(newest): newest}
    found = checkpoints(newest.parent)
    for path in found:
        if len(kept) < keep and path.name not in damaged and _looks_whole(path):
            kept.setdefault(step_of(path), path)
    oldest = min(_order(path.name) for path in kept.values())
    for path in found:
        order, same_step = _order(path.name), kept.get(step_of(path))
        if order < oldest or (same_step is not None and order < _order(same_step.name)):
            _delete(path)


def _delete(path: Path) -> None:
    """Hide first, then remove: a kill in between leaves nothing that looks like a checkpoint."""
    hidden = path.with_name(f"{DELETING}{path.name}-{uuid.uuid4().hex[:8]}")
    path.rename(hidden)
    if hidden.is_dir() and not hidden.is_symlink():
        shutil.rmtree(hidden)
    else:
        hidden.unlink()


def _looks_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except (Damaged, OSError):
        return False
    return True


def _write_synced(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


def _seal(files: dict[str, FileSum]) -> str:
    """Digest of the manifest's own content, so that no change of it goes unseen."""
    return hashlib.blake2b(json.dumps(sorted(files.items())).encode(), digest_size=16).hexdigest()


def _order(name: str) -> tuple[int, int]:
    """(step, revision) of a checkpoint folder's name."""
    match: Any = _STEP.fullmatch(name)
    return int(match.group(1)), int(match.group(2) or 0)


def merged(parts: Iterable[dict[str, FileSum]]) -> dict[str, FileSum]:
    """The files of all ranks together."""
    return {name: total for part in parts for name, total in part.items()}
