"""How is a YAML text read: plain scalars keep their text until a setting's type is known, and an error is one line."""

from __future__ import annotations

from typing import Any

import yaml

from ghostmask.engine.errors import InputError


class Plain(str):
    """A YAML scalar without quotes. Its looks do not decide its type (PyYAML takes 6e-3 for a string, on for true)."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self) or "(nothing)"


def read_yaml(text: str, source: str) -> Any:
    """The text's mappings as dict, sequences as list, quoted scalars as str and all others as Plain; {} when empty.

    Raises InputError "SOURCE:LINE: problem" for text that is not YAML and for a key that stands twice in a mapping.
    A text without a line end gets no LINE.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise InputError(f"{source}{line}: {error.problem or 'not YAML'}".replace("\n", " ")) from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: {str(error).splitlines()[0]}") from None
    return {} if value is None else value


class _Loader(yaml.SafeLoader):
    """PyYAML's reader without its rules for what a plain scalar means."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    return Plain(text) if node.style is None else text


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in lines:
            problem = f"{key} is given twice, first in line {lines[key]}"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        if isinstance(key, str):
            lines[key] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
