"""What several commands have among their arguments: how these are read, and what their help says."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ghostmask.engine.errors import InputError
from ghostmask.engine.launch import read_launch
from ghostmask.launcher import locate
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.folder import networks

CONFIG_HELP = "YAML file, or the name of a shipped config (ghostmask show configs)"
SETTINGS_HELP = "settings that go before the file's, such as mask.density=0.05 optim.milestones=[90,135]"
RUN_HELP = "a run's name (folder runs/NAME) or its folder"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """CONFIG and key=value."""
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=SETTINGS_HELP)


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """--ranks N, which `launcher.cli.run_command` acts on."""
    several = (
        "start N ranks on this machine, one per GPU where there are GPUs (default: 1, or what torchrun or srun set)"
    )
    parser.add_argument("--ranks", metavar="N", type=count, default=1, help=several)


def count(text: str) -> int:
    """A command-line number of at least 1; at most 10,000, each of which costs a pass or a run."""
    if not text.isdecimal() or len(text) > 5 or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1, at most 10000")
    return int(text)


def share(text: str) -> float:
    """A command-line number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number in (0, 1]")
    return value


def typed_path(field: str) -> Callable[[str], Path]:
    """How argparse reads a path: ~ is the home folder in it; files are written under names that are a little longer."""
    return lambda text: Path(locate.typed_path(field, text, longest_name=locate.LONGEST_NAME - len(".writing.")))


def check_networks(config: RunConfig) -> None:
    """Raise InputError where a function of the user's own is not there: that is said before any rank is waited for."""
    for name in sorted(networks(config)):
        if ":" in name:
            from ghostmask.models.foreign import find_builder

            find_builder(name)


def refuse_ranks(command: str) -> None:
    """Raise InputError where several ranks were started for a command of one process."""
    if read_launch().size > 1:
        raise InputError(f"ghostmask {command}: is not for several ranks; run it without torchrun, srun or --ranks")
