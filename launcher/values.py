"""Is a value of its setting's type, and how is it written as text?"""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

import yaml

from ghostmask.engine.errors import bad_value
from ghostmask.launcher.yaml_text import Plain

EXPECTED = {
    int: "int (a whole number, such as 20)",
    float: "float (a number, such as 0.1 or 6e-3)",
    bool: "bool (true or false)",
    str: 'str (text; write "null" or "" with quotes)',
}
"""What an error calls the type of a setting."""

INT = re.compile(r"[-+]?[0-9]{1,30}")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
"""Numbers of YAML 1.2's core schema: 6e-3 is one, unlike in PyYAML."""
BARE = re.compile(r"[A-Za-z0-9_./-]+")


def convert(name: str, value: Any, kind: Any) -> Any:
    """The value as the type of setting `name`: int, float, bool, str or tuple[one of these, ...].

    An int will do for a float, and nothing else for anything else. Raises InputError with name, value and type.
    """
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise bad_value(name, value, f"expected a list of {item.__name__}, such as [a, b] or []")
        return tuple(convert(f"{name}[{i}]", part, item) for i, part in enumerate(value))
    if isinstance(value, str):
        require_text(name, value)
    converted = _from_plain(value, kind) if isinstance(value, Plain) else _from_python(value, kind)
    if converted is None:
        raise bad_value(name, value, f"expected {EXPECTED[kind]}")
    return converted


def require_text(name: str, text: str) -> None:
    """Raise the InputError of setting `name` for a text that no file can hold or be called: a byte of the command line
    that was not UTF-8, or a NUL."""
    if "\0" in text:
        raise bad_value(name, text, "holds a NUL character; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_value(name, text, "is not UTF-8; give a name that is") from None


def as_text(value: Any) -> str:
    """A setting's value as YAML that readers of version 1.1 and of 1.2 understand alike."""
    if isinstance(value, tuple):
        return f"[{', '.join(as_text(part) for part in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    text = repr(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def _from_plain(text: Plain, kind: type) -> Any:
    """The value of an unquoted scalar, None if it is not of this kind."""
    if kind is bool:
        return {"true": True, "false": False}.get(text)
    if kind is str:
        return None if text in ("", "~", "null", "Null", "NULL") else str(text)
    if kind is int:
        return int(text) if INT.fullmatch(text) else None
    number = text.lower().replace(".inf", "inf").replace(".nan", "nan")
    return float(number) if FLOAT.fullmatch(text) else None


def _from_python(value: Any, kind: type) -> Any:
    """A Python value or quoted scalar as this kind, None if it is not one."""
    if isinstance(value, bool) or kind is bool:
        return value if isinstance(value, bool) and kind is bool else None
    if kind is float and isinstance(value, int):
        return float(value) if abs(value) < 2**1000 else None
    return value if isinstance(value, kind) else None


def _quoted(text: str) -> str:
    """The text as a YAML scalar, in quotes where a reader could take it for anything but a string."""
    if BARE.fullmatch(text) and not FLOAT.fullmatch(text) and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, default_style='"', width=float("inf")).rstrip("\n")
