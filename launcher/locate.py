"""Which file does a CONFIG argument mean, and which folder a RUN argument?"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory

from ghostmask import configs
from ghostmask.engine.errors import InputError, bad_value, unknown_name
from ghostmask.launcher.values import require_text

LONGEST_NAME, LONGEST_PATH = 255, 3500
"""Bytes of one name, which is what Linux' file systems take, and of a whole path (4,096), with room for what is written
below it."""
FIRST = "first_try"
"""An example of a name."""
RUNS = Path("runs")
"""Where runs without a folder of their own are kept, relative to the working directory."""


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
    names = [str(folder.parent / name) if "/" in text else name for name in _runs_in(folder.parent)]
    if not names:
        raise InputError(f"run = {text!r}: there is no run in {folder.parent}/; give a run's name or folder")
    raise unknown_name("run", text, names)


def _runs_in(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.yaml"))
