"""What can be typed before a run: init and doctor."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable

from ghostmask.engine.launch import read_launch
from ghostmask.launcher import locate, settings
from ghostmask.launcher.arguments import add_ranks, add_settings, check_networks, refuse_ranks, typed_path
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
    check_networks(config)
    from ghostmask.launcher.doctor.run import doctor

    return doctor(config)


def _describe_init(parser: Parser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=typed_path("FOLDER"), help="images, as train/CLASS/*.jpg")
    parser.add_argument("--out", metavar="FILE", type=typed_path("--out"), help="the YAML (default: FOLDER's name)")
    parser.set_defaults(handler=_init)


def _init(arguments: Namespace) -> int:
    refuse_ranks("init")
    from ghostmask.launcher.init.write import init

    return init(arguments.folder, arguments.out)


BEFORE_COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "init": ("look at a folder of images and write a config that fits it, with the reasons", _describe_init),
    "doctor": ("look whether a run would work here, and how long it would take, in under 2 minutes", _describe_doctor),
}
"""Command -> what it does in one line, and the function that adds its arguments."""
