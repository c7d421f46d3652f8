"""Who is the run in a folder: run.json, which is written once, and proves that the folder is a run's."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ghostmask.engine.atomic import read_small, replacing
from ghostmask.engine.checkpoint.files import META, Damaged, check_digests, checkpoints, read_manifest
from ghostmask.engine.errors import InputError

FILE = "run.json"
PACKAGES = ("ghostmask", "torch", "torchvision", "deepspeed", "ffcv", "numpy")

EXPORTED = ("packed", "small", "onnx", "coreml", "2_4")
"""Folders of `ghostmask export --format`."""
BESIDE = ("README.md", "network.py", "load_*.py", "__pycache__", ".*.writing")
"""What lies beside an exported network; the cache is Python's, of who imported network.py there."""
WRITTEN = {
    # First: a run whose checkpoints are gone and whose export is not would look finished.
    **{f"export/{name}": ("model.*", *BESIDE) for name in EXPORTED},
    "export": ("model.safetensors", "summary.json", *BESIDE, ".*.earlier"),
    "checkpoints": ("step-*", "latest", ".latest-new", ".writing-*", ".deleting-*"),
    "tensorboard": ("events.out.tfevents.*",),
    "hang": ("stacks-rank-*.txt", "*_trace_*"),
    "profile": ("*.pt.trace.json*",),
    "hessian": ("metrics.jsonl", "events.out.tfevents.*", "tensorboard/events.out.tfevents.*", "tensorboard"),
    "report": ("report.html", ".*.writing"),
    ".": ("metrics.jsonl", "events.out.tfevents.*", "config.yaml", FILE, ".*.writing"),
}
"""Folder -> what a run writes into it, and so what --restart removes; the folder too, where nothing else is in it."""

OTHERS = (".lease", "job", "job.json", "code")
"""In a run folder, but of its owner and its jobs: --restart leaves them alone."""


@dataclass(frozen=True)
class Record:
    """run: identity of the run, kept in each of its checkpoints; made: when, in UTC; versions: of the software then;
    started_from: the checkpoint that it started from, "" for a run from its seed."""

    run: str
    made: str
    versions: dict[str, str]
    started_from: str = ""


def new_record(started_from: str = "") -> Record:
    """The record of a run that starts now."""
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Record(uuid.uuid4().hex, made, versions(), started_from)


def read_record(folder: Path) -> Record | None:
    """The record of the run in `folder`, from a sealed checkpoint where run.json is lost; None where there is none.
    Raises InputError for one that cannot be read."""
    try:
        return Record(**json.loads(read_small(folder / FILE)))
    except (FileNotFoundError, NotADirectoryError):
        meta = sealed_meta(folder) or {}
        return Record(meta["run"], "", meta.get("versions", {})) if meta.get("run") else None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"run = {str(folder)!r}: its {FILE} cannot be read ({error}); restore it, or give another run=NAME"
        ) from None


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a new run."""
    with replacing(folder / FILE) as writing:
        writing.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Raise InputError where `folder` holds files under a run's names that no run wrote, as far as one can know."""
    try:
        if read_record(folder) is not None:
            return
    except OSError as error:
        raise InputError(f"run = {str(folder)!r}: cannot be read ({error.strerror}: {error.filename})") from None
    found = [name for name in ("config.yaml", "metrics.jsonl", "checkpoints", "export") if (folder / name).exists()]
    if found:
        raise InputError(
            f"run = {str(folder)!r}: holds {', '.join(found)}, and no {FILE} that would show that a run wrote them; "
            "nothing was touched: give another run=NAME, or move them away"
        )


def remove_written(folder: Path) -> list[str]:
    """Remove what the run in `folder` wrote; returns what is left. Only where `read_record` finds one."""
    for name, patterns in WRITTEN.items():
        place = folder / name
        for path in [path for pattern in patterns for path in sorted(place.glob(pattern))]:
            _remove(path)
        if name != "." and place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()
    return sorted(path.name for path in folder.iterdir() if path.name not in OTHERS)


def versions() -> dict[str, str]:
    """Package -> version, of what decides a run's bits."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def sealed_meta(folder: Path) -> dict[str, Any] | None:
    """The meta of the newest checkpoint of the run in `folder` whose seal and meta are whole; None where none is."""
    for path in checkpoints(folder / "checkpoints"):
        try:
            check_digests(path, {META: read_manifest(path)[META]})
            return dict(json.loads(read_small(path / META)))
        except (OSError, ValueError, Damaged):
            continue
    return None


def _remove(path: Path) -> None:
    """A file, a checkpoint's folder with the files in it, a folder of Core ML's, or one that was not in place yet."""
    if path.suffix in (".mlpackage", ".writing", ".earlier") and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            if inner.is_dir() and not inner.is_symlink():
                return  # a run writes no folder there
        for inner in path.iterdir():
            inner.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
