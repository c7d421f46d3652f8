"""Turns a registry's "module:name" into the object, importing the module when it is needed and not before."""

from __future__ import annotations

import importlib
from typing import Any


def resolve(entry: str) -> Any:
    """The object behind "package.module:name"."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)
