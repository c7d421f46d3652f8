"""How is a YAML text read: plain scalars keep their text until a setting's type is known, and an error is one line."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ghostmask.engine.atomic import read_small
from ghostmask.engine.errors import InputError, cut, printable

LONGEST_TEXT = 100_000
"""Characters of a YAML text: ten times a resolved configuration, read in seconds."""
DEEPEST = 20
"""Levels of lists and mappings inside each other; a configuration has three."""
MOST_VALUES = 10_000
"""Values of a text once every alias is replaced by what it stands for."""
SPECIAL = "*&!%@`|>"
"""What has a meaning of its own at the start of a value, apart from quotes and brackets."""
ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
"""How a file begins that is not UTF-8, the longer marks first."""


class Plain(str):
    """A YAML scalar without quotes. Its looks do not decide its type (PyYAML takes 6e-3 for a string, on for true)."""

    __slots__ = ()

    def __repr__(self) -> str:
        return printable(self) or "(nothing)"


def read_yaml_file(file: Path) -> Any:
    """As read_yaml, of a file in UTF-8. Raises InputError for one that is none, is not a regular file or too long."""
    try:
        content = read_small(file, 4 * LONGEST_TEXT)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    other = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), None)
    if other:
        raise InputError(f"{file}: is {other}; save it as UTF-8")
    try:
        return read_yaml(content.removeprefix(codecs.BOM_UTF8).decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        raise InputError(f"{file}:{line}: cannot be read: byte 0x{byte:02x} is not UTF-8; save it as UTF-8") from None


def read_yaml(text: str, source: str) -> Any:
    """The text's mappings as dict, sequences as list, quoted scalars as str and all others as Plain; {} when empty.

    Raises InputError "SOURCE:LINE: problem" for text that is not YAML, for a key that stands twice in a mapping, for
    tags, invisible characters outside of quotes, and for what is too long or too deep, also by its aliases. A text
    without a line end gets no LINE.
    """
    if len(text) > LONGEST_TEXT:
        raise InputError(f"{cut(source, 200)}: is longer than {LONGEST_TEXT} characters; that is no configuration")
    try:
        _refuse_control_characters(text)
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise InputError(f"{source}{line}: {_problem(text, error, mark)}") from None
    except (ValueError, OverflowError) as error:  # such as the escape of a character that does not exist
        raise InputError(f"{source}: is not YAML: {error}") from None
    return {} if value is None else value


class _Loader(yaml.SafeLoader):
    """PyYAML's reader without its rules for what a plain scalar means, without tags, and with limits."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._extents: dict[int, tuple[int, int]] = {}
        """id of a finished node -> (values in it, levels in it), aliases replaced."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, with what stands in it. Called by itself for every level."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            fix = "leave it out, or put text that begins with ! in quotes"
            _refuse(f"tags such as {tag} are not read here; {fix}", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and event.style is None:
            _refuse_invisible(event)
        self._depth += 1
        if self._depth > DEEPEST:
            _refuse(f"is nested more than {DEEPEST} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._extents:
                _refuse(f"the alias *{event.anchor} stands inside of what it names", event.start_mark)
        elif node is not None:
            self._measure(node, event.start_mark)
        return node

    def _measure(self, node: yaml.Node, mark: Any) -> None:
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
        extents = [self._extents[id(child)] for child in children]
        values = 1 + sum(number for number, _ in extents)
        levels = 1 + max((level for _, level in extents), default=0)
        if values > MOST_VALUES or levels > DEEPEST:
            what = f"more than {MOST_VALUES} values" if values > MOST_VALUES else f"more than {DEEPEST} levels"
            _refuse(f"holds {what} (an alias, *, counts as what it stands for)", mark)
        self._extents[id(node)] = values, levels


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    return Plain(text) if node.style is None else text


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in lines:
            _refuse(f"{key} is given twice, first in line {lines[key]}", key_node.start_mark)
        if isinstance(key, str):
            lines[key] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(None, None, problem, mark)


def _refuse_control_characters(text: str) -> None:
    """What may stand nowhere, not even in a comment: it would end a line unseen, or act on the terminal."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines):
        for column, character in enumerate(line):
            if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character != "\t":
                mark = yaml.Mark("", 0, number, column, None, 0)
                _refuse(f"holds {_named(character)}; save it as plain text, in UTF-8", mark)


def _refuse_invisible(event: yaml.ScalarEvent) -> None:
    for character in event.value:
        if not character.isprintable() and character not in "\n\t":
            fix = "put the text in quotes if it is meant to be there, or write an ordinary space or none"
            _refuse(f"{printable(event.value)} holds {_named(character)}; {fix}", event.start_mark)


def _named(character: str) -> str:
    name = unicodedata.name(character, "an invisible character").lower()
    return f"{name} (U+{ord(character):04X})"


def _problem(text: str, error: yaml.MarkedYAMLError, mark: Any) -> str:
    """What PyYAML says, with the way out where text begins with a character that means something to YAML."""
    problem = error.problem or "not YAML"
    begin = error.context_mark or mark
    first = text[begin.index] if begin is not None and begin.index < len(text) else ""
    if isinstance(error, yaml.scanner.ScannerError | yaml.composer.ComposerError):
        if first == "\t":
            return f"{problem}; indent with spaces, not with a tab"
        if first and first in SPECIAL:
            return f'{problem}; text that begins with {first} needs quotes, such as "{first}..."'
    return problem
