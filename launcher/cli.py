"""What can be typed: the subcommands of `ghostmask`, their options, and which function each of them calls."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ghostmask.benchmarks.registry import BENCHMARKS
from ghostmask.engine.config import DEVICES
from ghostmask.engine.errors import InputError, bad_value, output
from ghostmask.engine.launch import read_launch
from ghostmask.launcher import locate, settings, show
from ghostmask.launcher.arguments import (
    CONFIG_HELP,
    RUN_HELP,
    SETTINGS_HELP,
    add_ranks,
    add_settings,
    check_networks,
    count,
    refuse_ranks,
    typed_path,
)
from ghostmask.launcher.before import BEFORE_COMMANDS
from ghostmask.launcher.checks import check_config, check_finder
from ghostmask.launcher.cluster.commands import CLUSTER_COMMANDS
from ghostmask.launcher.environment import prepare_environment, say_loading
from ghostmask.launcher.examples import EXAMPLES
from ghostmask.launcher.exporting.commands import EXPORT_COMMANDS, run_or_export
from ghostmask.launcher.folder import other_data, read_run, resumed
from ghostmask.launcher.looking.commands import LOOKING_COMMANDS
from ghostmask.launcher.process import open_standard_streams, require_working_directory
from ghostmask.launcher.searches import SEARCH_COMMANDS
from ghostmask.launcher.source import find_source
from ghostmask.launcher.tables import TABLE_COMMANDS

SHELLS = ("bash", "zsh", "fish")
LOADING = ("train", "evaluate", "export", "hessian", "find-mask", "doctor", "bench")
"""Commands that load what takes seconds."""
OUT_HELP = "the file to write (default: mask.safetensors in the run folder)"


def run_command(argv: Sequence[str]) -> int:
    """Parse the arguments, run the command they name, return its exit code.

    Raises InputError for wrong arguments and settings before torch is imported.
    """
    open_standard_streams()
    require_working_directory()
    parser = build_parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
    except SystemExit as done:  # --help and --version have printed
        return int(done.code or 0)
    # argparse leaves out what follows an option: train CONFIG --restart mask.density=0.02
    if rest and ("overrides" not in arguments or any(item.startswith("-") for item in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    handler: Callable[[Namespace], int] = arguments.handler
    if getattr(arguments, "ranks", 1) > 1:
        return _start_ranks(arguments.ranks, argv)
    if argv[0] in LOADING and sys.stderr.isatty():
        say_loading()
    return handler(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    summary = "Trains sparse networks: a given density, the best accuracy at it, runs that can be killed at any step."
    parser = _Parser(prog="ghostmask", description=summary, epilog=EXAMPLES[""])
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of ghostmask and what it runs on"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    train = _add(commands, "train", "train a run, or go on with it where it stopped", _train)
    add_settings(train)
    train.add_argument(
        "--restart", action="store_true", help="start over, even where the run folder holds a checkpoint"
    )
    train.add_argument(
        "--from", dest="source", metavar="RUN[@STEP]", help="start a new run from a checkpoint of another one"
    )
    train.add_argument(
        "--new-data", action="store_true", help="go on although the data are others than the run was trained on"
    )
    dry = "train nothing: print what the run would be, and what time, memory and disk it would take"
    train.add_argument("--dry-run", action="store_true", help=dry)
    add_ranks(train)
    evaluate = _add(commands, "evaluate", "print the accuracy and density of a run's network", _evaluate)
    evaluate.add_argument("run", metavar="RUN", help=RUN_HELP)
    evaluate.add_argument(
        "overrides",
        metavar="data.KEY=VALUE",
        nargs="*",
        help="other data of the same classes: data.root=/other",
    )
    add_ranks(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    evaluate.add_argument(
        "--per-class", metavar="FILE", help="also write the accuracy of each class to FILE, as CSV; - prints a table"
    )
    hessian = _add(commands, "hessian", "print the Hessian's largest eigenvalues at a run's checkpoints", _hessian)
    hessian.add_argument("run", metavar="RUN", help=RUN_HELP)
    hessian.add_argument(
        "--out", metavar="FOLDER", type=typed_path("--out"), help="where to write it (default: RUN/hessian)"
    )
    hessian.add_argument("--top", metavar="K", type=count, default=5, help="how many eigenvalues (default: 5)")
    hessian.add_argument(
        "--batches", metavar="N", type=count, default=4, help="training batches the loss is taken on (default: 4)"
    )
    find = _add(commands, "find-mask", "find a mask before training and write it to a file", _find_mask)
    add_settings(find)
    find.add_argument(
        "--out",
        metavar="FILE",
        type=typed_path("--out"),
        help=OUT_HELP,
    )
    add_ranks(find)
    prepare = _add(commands, "prepare", "download a config's dataset and write its .beton files", _prepare)
    add_settings(prepare)
    added = BEFORE_COMMANDS | EXPORT_COMMANDS | CLUSTER_COMMANDS | SEARCH_COMMANDS | LOOKING_COMMANDS
    for name, (summary, describe) in added.items():
        describe(_add(commands, name, summary))
    _add_bench(_add(commands, "bench", "time one part of the system against textbook code", _bench))
    for name, (summary, describe) in TABLE_COMMANDS.items():
        describe(_add(commands, name, summary))
    shell = _add(commands, "completion", "print the script with which a shell completes ghostmask's words", _completion)
    shell.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    _add_topics(_add(commands, "show", "print settings, or what can be chosen"))
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse, with examples below each help text and InputError in place of an exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """--version: looks the versions up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        output(show.versions())
        parser.exit()


def _add(commands: Any, name: str, summary: str, handler: Callable[[Namespace], int] | None = None) -> _Parser:
    parser: _Parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=EXAMPLES.get(name)
    )
    parser.set_defaults(handler=handler)
    return parser


def _add_bench(parser: _Parser) -> None:
    names = list(BENCHMARKS)
    parser.add_argument("benchmark", metavar="BENCHMARK", choices=names, help=f"one of {', '.join(names)}")
    parser.add_argument("run", metavar="RUN", nargs="?", help=f"of export: {RUN_HELP}")
    parser.add_argument("--json", metavar="FILE", type=typed_path("--json"), help="also write the rows to FILE")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="as train.device")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: no numbers to quote")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a row does not meet its bar")


def _add_topics(parser: _Parser) -> None:
    topics = parser.add_subparsers(title="topics", metavar="TOPIC", required=True, parser_class=_Parser)
    config = _add(topics, "config", "print every setting of a config (or the defaults) with its meaning", _show_config)
    config.add_argument("overrides", metavar="[CONFIG] [key=value]", nargs="*", help=f"{CONFIG_HELP}; {SETTINGS_HELP}")
    for name, table in show.TABLES.items():
        topic = _add(topics, name, f"print the {name} by name, with a line on each")
        topic.set_defaults(handler=lambda _, table=table: _print("\n".join(table())))
        if name == "methods":
            topic.add_argument("name", metavar="NAME", nargs="?", help="one of them: all that its file says of it")
            topic.set_defaults(handler=_show_methods)


def _start_ranks(ranks: int, argv: Sequence[str]) -> int:
    refuse_ranks("--ranks")
    from ghostmask.launcher.local_ranks import start_ranks

    return start_ranks(ranks, argv)


def _train(arguments: Namespace) -> int:
    config = settings.load_config(arguments.config, arguments.overrides)
    if arguments.restart and arguments.source:
        raise InputError("--restart: starts the run over from its seed, --from from a checkpoint; leave one out")
    source = find_source(arguments.source) if arguments.source else None
    check_config(resumed(config, restart=arguments.restart), read_launch().size)
    locate.check_writable(settings.run_folder(config), "run", config.run)
    prepare_environment(config.train.device)
    check_networks(config)
    if arguments.dry_run:
        from ghostmask.launcher.dry_run import dry_run

        return dry_run(resumed(config, restart=arguments.restart))
    from ghostmask.launcher.train import train

    return train(config, restart=arguments.restart, source=source, new_data=arguments.new_data)


def _evaluate(arguments: Namespace) -> int:
    run = locate.find_run(arguments.run)
    config = other_data(run, arguments.overrides)
    per_class = arguments.per_class
    if per_class not in (None, "-"):
        per_class = str(typed_path("--per-class")(per_class))
        locate.output_file("--per-class", Path(per_class))
    prepare_environment(config.train.device)
    from ghostmask.launcher.evaluate import evaluate

    return evaluate(run, config, as_json=arguments.json, per_class=per_class)


def _hessian(arguments: Namespace) -> int:
    run = locate.find_run(arguments.run)
    out = locate.output_folder(arguments.out, run / "hessian")
    prepare_environment(_device_of(run))
    from ghostmask.launcher.hessian import hessian

    return hessian(run, out, top=arguments.top, batches=arguments.batches)


def _find_mask(arguments: Namespace) -> int:
    config = settings.load_config(arguments.config, arguments.overrides)
    check_config(config, read_launch().size)
    check_finder(config)
    out = arguments.out or settings.run_folder(config) / "mask.safetensors"
    if out.suffix != ".safetensors":
        raise bad_value("--out", str(out), "give a file ending in .safetensors")
    locate.check_writable(out.parent, "--out", str(out))
    prepare_environment(config.train.device)
    check_networks(config)
    from ghostmask.launcher.find_mask import find_mask

    return find_mask(config, out)


def _prepare(arguments: Namespace) -> int:
    refuse_ranks("prepare")
    config = settings.load_config(arguments.config, arguments.overrides)
    check_config(config, world_size=1)
    prepare_environment(config.train.device)
    from ghostmask.data_pipelines.open import prepare

    return _print("\n".join(f"{split}: {path}" for split, path in prepare(config.data).items()))


def _bench(arguments: Namespace) -> int:
    refuse_ranks("bench")
    if arguments.strict and arguments.quick:
        raise InputError("--strict: the numbers of --quick mean nothing; leave one of them out")
    if (arguments.benchmark == "export") != (arguments.run is not None):
        raise InputError("RUN: `ghostmask bench export RUN` measures a run's network; the other benchmarks take none")
    locate.output_file("--json", arguments.json)
    run = run_or_export(arguments.run) if arguments.run else None
    prepare_environment(arguments.device)
    from ghostmask.launcher.bench import bench

    return bench(
        arguments.benchmark, device=arguments.device, quick=arguments.quick, file=arguments.json,
        strict=arguments.strict, run=run,
    )  # fmt: skip


def _completion(arguments: Namespace) -> int:
    from ghostmask.launcher.completion import completion

    return _print(completion(arguments.shell, build_parser()))


def _show_config(arguments: Namespace) -> int:
    first, *others = arguments.overrides or [""]
    named = first and "=" not in first
    config = settings.load_config(first if named else None, others if named else arguments.overrides)
    if named:
        check_config(config, world_size=1)
        from ghostmask.launcher.derived import derived

        return _print("\n".join([settings.to_yaml(config).rstrip("\n"), *derived(config)]))
    return _print(settings.to_yaml(config))


def _show_methods(arguments: Namespace) -> int:
    if not arguments.name:
        return _print("\n".join(show.methods()))
    from ghostmask.launcher.method_page import method_page

    return _print(method_page(arguments.name))


def _device_of(run: Path) -> str:
    return read_run(run).train.device


def _print(text: str) -> int:
    output(text.rstrip("\n"))
    return 0
