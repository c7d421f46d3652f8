"""Several runs from one command: every combination of the values that settings are given."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ghostmask.engine.errors import bad_value

COMMA = re.compile(r",(?![^\[]*\])")
"""Between values, and not within a list such as [90,135]."""


def combinations(option: str, varied: Sequence[str]) -> list[list[str]]:
    """Lists of key=value, one per combination, of items "key=a,b", each crossed with the others. Raises InputError that
    names `option`."""
    return [list(chosen) for chosen in itertools.product(*(_values(option, text) for text in varied))]


def run_name(chosen: Sequence[str]) -> str:
    """What the run of a combination is called: "density=0.1-seed=0"."""
    pairs = [text.partition("=") for text in chosen]
    return "-".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs).replace("/", "_")


def _values(option: str, text: str) -> list[str]:
    key, equals, values = text.partition("=")
    parts = COMMA.split(values)
    if not equals or not all(parts):
        raise bad_value(option, text, "give a setting and its values, such as mask.density=0.1,0.05")
    return [f"{key}={value}" for value in parts]
