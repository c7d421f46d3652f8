"""What can be typed before a run: doctor."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable

from ghostmask.engine.launch import read_launch
from ghostmask.launcher import locate, settings
from ghostmask.launcher.arguments import add_ranks, add_settings, check_network
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.environment import prepare_environment
from ghostmask.launcher.folder import resumed

Parser = argparse.ArgumentParser


def _describe_doctor(parser: Parser) -> None:
    add_settings(parser)
    add_ranks(parser)
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: Namespace) -> int:
    config = resumed(settings.load_config(arguments.config, arguments.overrides))
    check_config(config, read_launch().size)
    locate.check_writable(settings.run_folder(config), "run", config.run)
    prepare_environment(config.train.device)
    check_network(config.model.name)
    from ghostmask.launcher.doctor.run import doctor

    return doctor(config)


BEFORE_COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "doctor": ("look whether a run would work here, and how long it would take, in under 2 minutes", _describe_doctor),
}
"""Command -> what it does in one line, and the function that adds its arguments."""
