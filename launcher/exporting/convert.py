"""ghostmask export RUN --format F: another format of the network that an export left."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence, Set
from pathlib import Path

from ghostmask.engine.atomic import WRITING, read_small, replacing_folder
from ghostmask.engine.checkpoint.files import checkpoints, step_of
from ghostmask.engine.errors import InputError, bad_value, output, to_stderr
from ghostmask.engine.registry import resolve
from ghostmask.launcher.export import MODEL_FILE, SUMMARY_FILE
from ghostmask.launcher.exporting import card
from ghostmask.launcher.exporting.exported import OTHERWISE, Exported, Options, Written, read_exported
from ghostmask.launcher.exporting.registry import FORMATS

CACHE = "__pycache__"
"""What Python leaves in a folder whose network.py was imported."""


def export_format(source: Path, out: Path, name: str, options: Options) -> int:
    """Write `out` in format `name` from the export in `source`, and print what was written; returns the exit code."""
    written = write_format(read_exported(source), out, name, options)
    for line in written.notes:
        output(line)
    sizes = [f"{file} ({_shown(size_of(out / file))})" for file in written.files]
    output(f"{out}: {', '.join([*sizes, card.FILE])}")
    return 0


def write_format(exported: Exported, out: Path, name: str, options: Options) -> Written:
    """The format's files and its model card, in `out`, which then holds nothing else: all of them or, after a kill or
    on a full disk, what was there before. Raises InputError where this network does not have the format, where `out`
    cannot be replaced, or holds what no export of this format wrote."""
    _check_place(out)
    try:
        with replacing_folder(out) as folder:
            written = _make(exported, folder, name, options)
            texts = [(folder / file).read_text(encoding="utf-8") for file in written.files if file.endswith(".py")]
            text = card.card(
                exported.summary, written.load, written.files, written.notes, loads=written.loads, sources=texts
            )  # fmt: skip
            (folder / card.FILE).write_text(text, encoding="utf-8")
            _check_owned(out, {*written.files, card.FILE})
    except OSError as error:
        fix = f"cannot be written ({error.strerror or error}); nothing changed, give another place"
        raise bad_value("--out", str(out), fix) from error
    return written


def _make(exported: Exported, folder: Path, name: str, options: Options) -> Written:
    try:
        written: Written = resolve(FORMATS[name])(exported, folder, options)
        return written
    except (InputError, OSError):
        raise
    except Exception as error:  # whatever torch's exporters raise for a network that they do not take
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise InputError(f"--format = {name!r}: cannot be made of this network ({reason}); {OTHERWISE}") from error


def _check_place(out: Path) -> None:
    """Raise InputError where `out` cannot be replaced as a whole."""
    place = os.path.realpath(out)
    for kept, what in ((os.getcwd(), "the working directory"), (os.path.expanduser("~"), "the home folder")):
        if os.path.commonpath([os.path.realpath(kept), place]) == place:
            raise bad_value("--out", str(out), f"is or holds {what}; give a folder of its own, such as {out / 'new'}")
    if os.path.ismount(place):
        raise bad_value("--out", str(out), f"is where a disk is mounted; give a folder in it, such as {out / 'new'}")


def _check_owned(out: Path, files: Set[str]) -> None:
    """Raise InputError where something lies in `out` that this format does not write."""
    there = {path.name for path in out.iterdir() if path.suffix != f".{WRITING}"} if out.is_dir() else set()
    others = sorted(there - files - {CACHE})
    if others:
        fix = "which an export of this format does not write; give a folder of its own, or move it away"
        raise bad_value("--out", str(out), f"holds {others[0]!r}, {fix}")


def _shown(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def exported_folder(run: Path) -> Path:
    """Where the export of a run lies, or `run` itself where it is one. Raises InputError where there is none; warns
    where the run has gone on since."""
    if (run / SUMMARY_FILE).is_file():
        return run
    folder = run / "export"
    if not (folder / MODEL_FILE).is_file() or not (folder / SUMMARY_FILE).is_file():
        raise InputError(
            f"RUN = {str(run)!r}: there is no {folder / MODEL_FILE}; finish the run, or write it with: "
            f"ghostmask export {run}"
        )
    _warn_if_old(run, folder)
    return folder


def _warn_if_old(run: Path, folder: Path) -> None:
    steps: Sequence[Path] = checkpoints(run / "checkpoints")
    try:
        step = int(json.loads(read_small(folder / SUMMARY_FILE))["run"]["step"])
        newest = max(map(step_of, steps))
    except (OSError, ValueError, KeyError, TypeError):
        return
    if newest > step:
        to_stderr(f"{folder} is of step {step}, the run is at {newest}; for that: ghostmask export {run}")
