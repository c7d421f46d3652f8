"""Which mask method does a name mean, and is what stands behind it complete? Also of names that are nearly right."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

from ghostmask.engine.errors import LONGEST_VALUE, InputError, cut
from ghostmask.engine.registry import resolve
from ghostmask.masks.registry import METHODS
from ghostmask.masks.settings import MaskSettings

if TYPE_CHECKING:
    from ghostmask.masks.method import MaskMethod

FIELD = "mask.method"


def method_of(name: str, field: str = FIELD) -> type[MaskMethod]:
    """The class of a mask method; imports its file. Raises InputError of `field` for a name that is not known, and
    where the file lacks what a method must have (CONTRIBUTING.md)."""
    if name not in METHODS:
        raise _unknown(name, field)
    return _complete(METHODS[name])


def methods() -> dict[str, type[MaskMethod]]:
    """Every method by name."""
    return {name: method_of(name) for name in METHODS}


@cache
def _complete(entry: str) -> type[MaskMethod]:
    from ghostmask.masks.method import MaskMethod  # imports torch

    found: Any = resolve(entry)
    lacks = None
    if not (inspect.isclass(found) and issubclass(found, MaskMethod)):
        lacks = "is not a subclass of masks.method.MaskMethod"
    elif inspect.isabstract(found):
        lacks = f"does not define {', '.join(sorted(found.__abstractmethods__))}"
    elif not (inspect.isclass(found.Settings) and issubclass(found.Settings, MaskSettings)):
        lacks = "has Settings that are no subclass of masks.settings.MaskSettings"
    if lacks:
        raise InputError(f"the mask method {entry!r} {lacks}; CONTRIBUTING.md lists what a method's file must have")
    return found  # type: ignore[no-any-return]


def _unknown(name: str, field: str) -> InputError:
    """Names the method whose alias was typed, else the names and aliases that are spelled most alike."""
    shown = f"{field} = {cut(repr(name), LONGEST_VALUE)}"
    module = f"ghostmask.masks.methods.{name}"
    listed = {entry.partition(":")[0] for entry in METHODS.values()}
    if name.isidentifier() and module not in listed and importlib.util.find_spec(module):
        return InputError(
            f"{shown}: there is masks/methods/{name}.py, but no line of masks/registry.py names it; add it"
        )
    meant, asked = _meanings(), _plain(name)
    near = [asked] if asked in meant else difflib.get_close_matches(asked, meant, n=1)
    hint = f"did you mean {' or '.join(meant[near[0]])}? " if near else ""
    return InputError(f"{shown} is not known: {hint}known: {', '.join(sorted(METHODS))}")


def _meanings() -> dict[str, list[str]]:
    """What can be typed, in small letters without hyphens and the like -> the methods that are meant, with what makes
    them that."""
    meant: dict[str, list[str]] = {}
    for name, found in methods().items():
        file = METHODS[name].partition(":")[0].rpartition(".")[2]
        for alias, _, settings in (text.partition(" ") for text in (name, file, *found.aliases)):
            meaning = f"{name!r} with {settings}" if settings else repr(name)
            known = meant.setdefault(_plain(alias), [])
            if meaning not in known:
                known.append(meaning)
    return meant


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
