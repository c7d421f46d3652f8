"""Which file does a CONFIG argument mean, and which folder a RUN argument?"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from ghostmask import configs
from ghostmask.engine.errors import InputError, bad_value, unknown_name

RUNS = Path("runs")
"""Where runs without a folder of their own are kept, relative to the working directory."""


def shipped_configs() -> dict[str, Path]:
    """The configs that come with ghostmask, by name, in alphabetical order."""
    return {path.stem: path for path in sorted(Path(configs.__path__[0]).glob("*.yaml"))}


def find_config(text: str) -> Path:
    """The YAML file behind a path, or behind the name of a shipped config with or without configs/ and .yaml.

    A file of the working directory goes before a shipped one. Raises InputError that lists the shipped names.
    """
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        resolved = path / "config.yaml"
        fix = f"is a folder; give the file {resolved}" if resolved.is_file() else "is a folder; give a YAML file"
        raise bad_value("config", text, fix)
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


def find_run(text: str) -> Path:
    """The folder of an existing run from its name (runs/NAME) or its path; it holds a config.yaml.

    Raises InputError that names the runs which do exist beside it.
    """
    for folder in (run_folder(text), Path(text)):
        if (folder / "config.yaml").is_file():
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
