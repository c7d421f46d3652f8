"""ghostmask show methods NAME: what does a mask method do, whose is it, what does it read, and where does one start?"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

from ghostmask.launcher.config import default_of
from ghostmask.launcher.locate import shipped_configs
from ghostmask.launcher.methods import method_of
from ghostmask.launcher.settings import field_docs
from ghostmask.launcher.show import first_comment
from ghostmask.launcher.values import as_text
from ghostmask.launcher.yaml_text import read_yaml_file
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.one_shot import OneShot

WIDTH = 100


def method_page(name: str) -> str:
    """All that a method's own file says of it. Raises InputError for a name that is not known."""
    method = method_of(name, "NAME")
    head = (ast.get_docstring(ast.parse(inspect.getsource(sys.modules[method.__module__]))) or "").strip()
    parts = [head, inspect.getdoc(method) or "", _facts(method), _settings(method), _configs(name)]
    return "\n\n".join(part for part in parts if part)


def _facts(method: type[MaskMethod]) -> str:
    others = [alias.partition(" ") for alias in method.aliases]
    rows = [
        ("paper", method.paper or "its file names none"),
        ("also called", ", ".join(f"{alias} ({settings})" if settings else alias for alias, _, settings in others)),
        ("trained", _phases(method)),
        ("density", _density(method)),
    ]
    return "\n".join(textwrap.fill(text, WIDTH, initial_indent=f"{what:<13}", subsequent_indent=" " * 13,
                                   break_long_words=False, break_on_hyphens=False)
                     for what, text in rows if text)  # fmt: skip


def _phases(method: type[MaskMethod]) -> str:
    if issubclass(method, OneShot):
        return "for train.epochs under a mask that is found before (ghostmask find-mask writes it to a file)"
    first = "for train.epochs, in which it finds its mask" if method.searches else "for train.epochs"
    return f"{first}; then fine-tuned for finetune.epochs" if method.finetunes else first


def _density(method: type[MaskMethod]) -> str:
    decides = method.Settings.decided_by
    return (
        "mask.density" if _has(method, "density") else f"a result, decided by {decides}" if decides else "not a setting"
    )


def _has(method: type[MaskMethod], field: str) -> bool:
    return field in {each.name for each in fields(method.Settings)}


def _settings(method: type[MaskMethod]) -> str:
    docs = field_docs(method.Settings)
    lines = ["settings, with their defaults"]
    for field in fields(method.Settings):
        if field.name != "method":
            lines += [
                f"  mask.{field.name}={as_text(default_of(field))}",
                textwrap.indent(docs.get(field.name, ""), " " * 6),
            ]
    return "\n".join(line for line in lines if line)


def _configs(name: str) -> str:
    """The shipped configs of the method, each with its first line."""
    found = {config: first_comment(path) for config, path in shipped_configs().items() if _method_in(path) == name}
    if not found:
        return f"configs: none has it; give any of them mask.method={name}"
    width = max(map(len, found))
    return "\n".join(["configs to start from", *(f"  {config:<{width}}  {text}" for config, text in found.items())])


def _method_in(path: Path) -> str:
    mask = read_yaml_file(path).get("mask", {})
    return str(mask.get("method", MaskMethod.Settings.method))
