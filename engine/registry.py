"""Turns a registry's "module:name" into the object, importing the module when it is needed and not before."""

from __future__ import annotations

import importlib
from typing import Any

from ghostmask.engine.errors import InputError


def resolve(entry: str) -> Any:
    """The object behind "package.module:name". Raises InputError where there is none: somebody's line is wrong."""
    module, _, name = entry.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # something that the module itself imports
            raise
        fix = "write that file, or correct the registry's line"
        raise InputError(f"the registry names {entry!r}, and there is no module {error.name}; {fix}") from None
    if not hasattr(found, name):
        raise InputError(f"the registry names {entry!r}, and {found.__file__} defines no {name!r}; correct one of them")
    return getattr(found, name)
