"""ghostmask completion: how does a shell know what can be typed? A script of it, made from the parser and the settings.

What stands in the script is what this version knows, so that a TAB starts no Python; runs and files are looked up.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass

from ghostmask.data_pipelines.registry import DATASETS
from ghostmask.launcher.completion_scripts import BASH, FISH, SHARED, ZSH
from ghostmask.launcher.locate import shipped_configs
from ghostmask.launcher.settings import PRESETS, setting_types
from ghostmask.masks.registry import METHODS
from ghostmask.models.registry import MODELS

KINDS = {
    "CONFIG": "configs",
    "RUN": "runs",
    "RUN[@STEP]": "runs",
    "key=value": "settings",
    "KEY=A,B,...": "settings",
    "METHOD[@DENSITY]:key=value": "settings",
    "data.KEY=VALUE": "data",
    "[CONFIG] [key=value]": "configs+settings",
    "CONFIG or key=value": "configs+settings",
    "FOLDER": "folders",
    "FILE": "files",
}
"""How an argument is called in the help texts -> the kind of words that it is completed with."""


@dataclass(frozen=True)
class Command:
    """A command as it is typed ("show methods"): a line on it, option -> (kind of its value, None for a flag; help),
    and the kinds of its arguments, of which the last one repeats."""

    name: str
    about: str
    options: dict[str, tuple[str | None, str]]
    arguments: list[str]


def completion(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script of bash, zsh or fish for the whole command line of `parser`."""
    commands = list(_commands(parser, "", ""))
    return (
        _fish(commands)
        if shell == "fish"
        else _posix(commands, (BASH if shell == "bash" else ZSH).replace("SHARED", SHARED))
    )


def words() -> dict[str, list[str]]:
    """Kind -> all of its words, for kinds that no file decides."""
    types = setting_types()
    leaves = [f"{name}=" for name, kind in types.items() if not is_dataclass(kind) or kind in PRESETS]
    return {
        "configs": list(shipped_configs()),
        "settings": leaves,
        "data": [name for name in leaves if name.startswith("data.")],
        "methods": list(METHODS),
    }


def values() -> dict[str, list[str]]:
    """Setting -> its values, where they are a few that are known."""
    types = setting_types()
    known = {name: ["true", "false"] for name, kind in types.items() if kind is bool}
    known |= {name: list(PRESETS[kind]) for name, kind in types.items() if kind in PRESETS}
    return known | {"mask.method": list(METHODS), "model.name": list(MODELS), "data.dataset": list(DATASETS)}


def _commands(parser: argparse.ArgumentParser, name: str, about: str) -> Iterator[Command]:
    options: dict[str, tuple[str | None, str]] = {}
    arguments: list[str] = []
    below: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for sub, inner in action.choices.items():
                below += _commands(inner, f"{name} {sub}".strip(), texts.get(sub, ""))
            arguments.append(f"words:{','.join(action.choices)}")
        elif action.option_strings:
            kind = None if action.nargs == 0 else _kind(action, name)
            options |= {option: (kind, action.help or "") for option in action.option_strings if option != "-h"}
        else:
            arguments.append(_kind(action, name))
    yield Command(name, about, options, arguments)
    yield from below


def _kind(action: argparse.Action, command: str) -> str:
    """Of an argument's words; "" where nothing is known of them."""
    if action.choices:
        return f"words:{','.join(map(str, action.choices))}"
    if command == "show methods":
        return "methods"
    return "folders" if action.dest == "folder" else KINDS.get(str(action.metavar), "")


def _posix(commands: list[Command], template: str) -> str:
    """bash and zsh share their `case`."""
    arguments, flags, taken = [], [], []
    for command in commands:
        arguments.append(f"""        "{command.name}") kinds="{" ".join(command.arguments)}" ;;""")
        flags.append(f"""        "{command.name}") options="{" ".join(command.options)}" ;;""")
        for option, (kind, _) in command.options.items():
            if kind is not None:
                taken.append(f"""        "{command.name} {option}") kind="{kind or "none"}" ;;""")
    known = [f"""        {kind}) list="{" ".join(found)}" ;;""" for kind, found in words().items()]
    of_keys = [f"""        {key}) list="{" ".join(found)}" ;;""" for key, found in values().items()]
    parts = {"ARGUMENTS": arguments, "OPTIONS": flags, "TAKEN": taken, "WORDS": known, "VALUES": of_keys}
    names = " ".join(f'"{command.name}"' for command in commands if command.name)
    for place, lines in parts.items():
        template = template.replace(f"        # {place}", "\n".join(lines))
    return template.replace("NAMES", names)


def _fish(commands: list[Command]) -> str:
    lines = []
    for command in commands:
        here = f"-n '__ghostmask_at {command.name}'"
        for kind in dict.fromkeys(part for argument in command.arguments for part in argument.split("+")):
            lines.append(f"complete -c ghostmask {here} {_fish_words(kind)}")
        for option, (taken, about) in command.options.items():
            value = "" if taken is None else f" -r {_fish_words(taken)}"
            lines.append(f"complete -c ghostmask {here} -l {option.removeprefix('--')}{value} -d {_quoted(about)}")
    lists = [f"set -g __ghostmask_{kind} {' '.join(found)}" for kind, found in words().items()]
    pairs = [f"{key}={value}" for key, found in values().items() for value in found]
    names = " ".join(_quoted(command.name) for command in commands if command.name)
    script = FISH.replace("NAMES", names).replace(
        "# LISTS", "\n".join([*lists, f"set -g __ghostmask_values {' '.join(pairs)}"])
    )
    return script + "\n".join(lines) + "\n"


def _fish_words(kind: str) -> str:
    if kind.startswith("words:"):
        return f"-f -a {_quoted(kind.removeprefix('words:').replace(',', ' '))}"
    if kind in ("files", "folders"):
        return "-F"
    if kind == "configs":
        return "-f -a '$__ghostmask_configs *.yaml'"
    if kind == "runs":
        return "-f -a '(__ghostmask_runs)'"
    if kind == "data":
        return "-f -a '$__ghostmask_data'"
    return f"-f -a '$__ghostmask_{kind}{' $__ghostmask_values' if kind == 'settings' else ''}'" if kind else "-f"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
