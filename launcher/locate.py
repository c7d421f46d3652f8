"""Which file does a CONFIG argument mean, and which folder a RUN argument?"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from ghostmask import configs
from ghostmask.engine.atomic import read_small, replacing
from ghostmask.engine.errors import InputError, bad_value, unknown_name
from ghostmask.launcher.values import require_text

LONGEST_NAME, LONGEST_PATH = 255, 3500
"""Bytes of one name, which is what Linux' file systems take, and of a whole path (4,096), with room for what is written
below it."""
FIRST = "first_try"
"""An example of a name."""
RUNS = Path("runs")
"""Where runs without a folder of their own are kept, relative to the working directory."""
DEEPEST = 6
"""Folders below runs/ in which runs are looked for: sweeps, and what people sort them by."""
ELSEWHERE = {"data", "checkpoints", "tensorboard"}
WRITTEN_BY_RUNS = {"export", "hang", "profile", "hessian", "report", "job", "code"}
"""Folders that hold no runs: anywhere, and in a run."""


def shipped_configs() -> dict[str, Path]:
    """The configs that come with ghostmask, by name, in alphabetical order."""
    return {path.stem: path for path in sorted(Path(configs.__path__[0]).glob("*.yaml"))}


def typed_path(field: str, text: str, *, longest_name: int = LONGEST_NAME) -> str:
    """A path that a user gave as `field`, with ~ replaced by the home folder, unless the shell did so.

    Raises InputError for what no file can be called. longest_name: bytes of one name in it.
    """
    require_text(field, text)
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise bad_value(field, text, "holds a control character, which acts on terminals; rename it")
    longest = max(text.split("/"), key=lambda name: len(name.encode()))
    if len(longest.encode()) > longest_name:
        raise bad_value(field, text, f"a name in it has {len(longest.encode())} bytes; give at most {longest_name}")
    if len(text.encode()) > LONGEST_PATH:
        raise bad_value(field, text, f"has {len(text.encode())} bytes; give at most {LONGEST_PATH}")
    path = os.path.expanduser(text) if os.environ.get("HOME") != "" or not text.startswith("~") else text
    if path.startswith("~"):
        user = text[1:].partition("/")[0]
        home = f"the user {user}" if user else "this user"
        raise bad_value(field, text, f"the home folder of {home} is not known; write ./{text} for a name with ~")
    return path


def find_config(text: str) -> Path:
    """The YAML file behind a path, or behind the name of a shipped config with or without configs/ and .yaml.

    A file of the working directory goes before a shipped one. Raises InputError that lists the shipped names.
    """
    path = Path(typed_path("config", text))
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        resolved = path / "config.yaml"
        fix = f"is a folder; give the file {resolved}" if resolved.is_file() else "is a folder; give a YAML file"
        raise bad_value("config", text, fix)
    if os.path.exists(path):
        raise bad_value("config", text, "is not a file but a pipe or device; give a YAML file")
    if path.suffix in ("", ".yaml") and path.parent.as_posix() in (".", "configs"):
        local = Path("configs", f"{path.stem}.yaml")
        found = local if local.is_file() else shipped_configs().get(path.stem)
        if found:
            return found
    elif path.suffix in (".yaml", ".yml"):
        raise bad_value("config", text, "there is no such file")
    raise unknown_name("config", text, shipped_configs())


def run_folder(run: str) -> Path:
    """runs/NAME for a name, the folder itself where the value has a slash."""
    return Path(run) if "/" in run else RUNS / run


def new_run_folder(run: str) -> Path:
    """As run_folder, of a run that writes there.

    Raises InputError where the name cannot be read on a terminal, and for the working directory, the home folder and
    all that they lie in: the files of a run would stand among others.
    """
    if not run.strip():
        raise bad_value("run", run, f"give the run a name, such as run={FIRST}")
    if not run.isprintable():
        raise bad_value("run", run, "holds characters that cannot be seen; give a name without them")
    if run in (".", ".."):
        raise bad_value("run", run, f"is no name of a run; give one, such as run={FIRST}")
    folder = run_folder(run)
    real = os.path.realpath(folder)
    for place, what in ((os.getcwd(), "the working directory"), (os.path.expanduser("~"), "the home folder")):
        if os.path.commonpath([real, os.path.realpath(place)]) == real:
            lies = "is" if real == os.path.realpath(place) else "holds"
            raise bad_value("run", run, f"{lies} {what}; give a folder of the run's own, such as run={FIRST}")
    return folder


def check_writable(folder: Path, field: str, value: str) -> None:
    """Raise InputError of `field` unless files can be written to `folder`, which need not exist yet."""
    # os.path.exists says no where Path.exists raises: below a folder that this user may not enter.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise bad_value(field, value, f"{there} is a file; give another place")
    try:  # not os.access: it knows neither read-only disks nor what root may not do
        TemporaryDirectory(dir=there, prefix=".ghostmask-").cleanup()
    except OSError as error:
        raise bad_value(field, value, f"nothing can be written to {there} ({error.strerror}); give another") from None


def output_file(field: str, file: Path | None, *, new_folder: bool = False) -> None:
    """Raise InputError of `field` unless a file can be written there, in a folder that is there or may be made."""
    if file is None:
        return
    if os.path.exists(file) and not os.path.isfile(file):
        what = "a folder" if os.path.isdir(file) else "a pipe or device"
        raise bad_value(field, str(file), f"is {what}; give a file")
    if not new_folder and not os.path.isdir(file.parent):
        raise bad_value(field, str(file), f"there is no folder {str(file.parent)!r}; make it, or give another")
    check_writable(file.parent, field, str(file))


@contextmanager
def writing_to(field: str, file: Path) -> Iterator[Path]:
    """As `replacing`, of what a user asked for in `field`. Raises InputError where the disk does not take it."""
    try:
        with replacing(Path(os.path.realpath(file))) as writing:
            yield writing
    except OSError as error:
        raise bad_value(field, str(file), f"cannot be written ({error.strerror or error})") from error


def output_folder(asked: Path | None, usual: Path) -> Path:
    """Where a command that reads a run writes what it finds: a run's folder may be read-only."""
    out = asked or usual
    check_writable(out, "--out", str(out))
    return out


def find_run(text: str) -> Path:
    """The folder of an existing run from its name (runs/NAME) or its path; it holds a config.yaml.

    Raises InputError that names the runs which do exist beside it.
    """
    text = typed_path("run", text)
    for folder in (run_folder(text), Path(text)):
        if os.path.isfile(folder / "config.yaml"):
            return folder
    folder = run_folder(text)
    if folder.is_dir():
        raise bad_value("run", text, f"{folder} is not a run: it holds no config.yaml")
    below = (path / "config.yaml" for path in runs_in(folder.parent))
    found = sorted({file.parent for file in (*folder.parent.glob("*/config.yaml"), *below) if file.is_file()})
    names = [path.name if path.parent == RUNS else str(path) for path in found]
    if not names:
        raise InputError(f"run = {text!r}: there is no run in {folder.parent}/; give a run's name or folder")
    raise unknown_name("run", text, names)


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder and in folders in it, by path, also those that only have a configuration or a job yet.

    Cheap: what runs write, data and hidden folders are not looked into. One that links lead to again is one.
    """
    found = sorted(_runs_below(folder, DEEPEST), key=lambda path: -len(path.parts))
    return sorted({os.path.realpath(path): path for path in found}.values())


def _runs_below(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    inner: list[Path] = []
    with suppress(OSError), os.scandir(folder) as entries:
        names = {entry.name: entry for entry in entries}
        a_run = bool({"run.json", "job.json"} & names.keys()) or _is_config(names.get("config.yaml"))
        passed = WRITTEN_BY_RUNS | ELSEWHERE if a_run else ELSEWHERE
        inner = [folder / n for n, e in names.items() if n[0] != "." and n not in passed and depth and e.is_dir()]
        found = [folder] if a_run and depth < DEEPEST else []
    return found + [run for path in inner for run in _runs_below(path, depth - 1)]


def _is_config(file: os.DirEntry[str] | None) -> bool:
    """Whether a run wrote it: others write files of that name too."""
    if file is None or not file.is_file():
        return False
    with suppress(OSError, ValueError):
        text = "\n" + read_small(Path(file.path), 1 << 20).decode()
        return all(f"\n{section}:" in text for section in ("model", "data", "mask", "train"))
    return False
