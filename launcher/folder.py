"""What does a run folder say of its run, and may a command go on with it?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ghostmask.engine.errors import InputError
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.settings import GONE, differences, load_config, run_folder
from ghostmask.launcher.yaml_text import read_yaml


def read_run(folder: Path) -> RunConfig:
    """The configuration of the run in `folder`. Raises InputError; of a run of an older version it says that it is."""
    file = folder / "config.yaml"
    try:
        return load_config(str(file))
    except InputError as error:
        old = _gone(file)
        if old:
            raise older(folder, f"{old} in its config.yaml") from None
        fix = "restore it, give another run=NAME, or start over with ghostmask train --restart"
        raise InputError(f"run = {str(folder)!r}: its configuration cannot be read ({error}); {fix}") from None


def resumed(config: RunConfig, *, restart: bool = False) -> RunConfig:
    """`config`, with the parts of a batch that the run in its folder is cut into where it says nothing of them.

    Where there is nothing to go on with, and with restart, `config` as it is. Raises InputError where the run was
    started with other settings.
    """
    folder = run_folder(config)
    if restart or not (folder / "config.yaml").exists() or not any((folder / "checkpoints").glob("step-*")):
        return config
    before = read_run(folder)
    if not config.train.replicas:
        config = replace(config, train=replace(config.train, replicas=before.train.replicas))
    changes = differences(before, config)
    if changes:
        raise InputError(
            f"run = {str(folder)!r}: the run folder holds another configuration ({'; '.join(changes)}); "
            "give another run=NAME, or --restart to start over"
        )
    return config


def older(folder: Path, sign: str) -> InputError:
    """The error for a run that this version cannot go on with; sign: what shows it."""
    fix = "give another run=NAME, or start over with ghostmask train --restart"
    return InputError(
        f"run = {str(folder)!r}: was made by an older version of ghostmask ({sign}), whose checkpoints this one does "
        f"not read; {fix}"
    )


def _gone(file: Path) -> str:
    """The first setting of older versions that stands in a config file, with its value; "" where none does."""
    try:
        values = read_yaml(file.read_text(encoding="utf-8"), str(file))
    except (InputError, OSError, UnicodeDecodeError):
        return ""
    for name in GONE:
        section, _, key = name.partition(".")
        if isinstance(values, dict) and isinstance(values.get(section), dict) and key in values[section]:
            return name
    return ""
