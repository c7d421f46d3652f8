"""ghostmask export RUN --format F: another format of the network that an export left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ghostmask.engine.atomic import read_small, replacing
from ghostmask.engine.checkpoint.files import checkpoints, step_of
from ghostmask.engine.errors import InputError, output, to_stderr
from ghostmask.engine.registry import resolve
from ghostmask.launcher.export import MODEL_FILE, SUMMARY_FILE
from ghostmask.launcher.exporting import card
from ghostmask.launcher.exporting.exported import Exported, Options, Written, read_exported
from ghostmask.launcher.exporting.registry import FORMATS


def export_format(source: Path, out: Path, name: str, options: Options) -> int:
    """Write `out` in format `name` from the export in `source`, and print what was written; returns the exit code."""
    written = write_format(read_exported(source), out, name, options)
    for line in written.notes:
        output(line)
    sizes = [f"{file} ({size_of(out / file) / 1e6:.2f} MB)" for file in written.files]
    output(f"{out}: {', '.join([*sizes, card.FILE])}")
    return 0


def write_format(exported: Exported, out: Path, name: str, options: Options) -> Written:
    """The format's files and its model card, in `out`. Raises InputError where this network does not have it."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        written: Written = resolve(FORMATS[name])(exported, out, options)
    except InputError:
        with suppress(OSError):  # where something else lies in it
            out.rmdir()
        raise
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # of torch's exporters, mostly
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise InputError(f"--format = {name!r}: cannot be made of this network ({reason})") from error
    text = card.card(exported.summary, written.load, written.files, written.notes)
    with replacing(out / card.FILE) as writing:
        writing.write_text(text, encoding="utf-8")
    return written


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
