"""What do a run's files say, whatever became of it: live, damaged, unfinished, or of an older version?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeGuard

from ghostmask.engine.atomic import read_small
from ghostmask.engine.errors import InputError
from ghostmask.launcher.cluster.standing import Standing, standing
from ghostmask.launcher.yaml_text import Plain, read_yaml_file

Line = dict[str, Any]
Curve = list[tuple[int, float]]
"""(step, value), by step."""
LARGEST = 1 << 30
"""Bytes of metrics.jsonl that are read; a line has about 1 kB."""


@dataclass
class Seen:
    """A run as its files show it. settings: by dotted key, {} where config.yaml cannot be read; lines: of
    metrics.jsonl, by step; summary: of its export, {} without one; stands: see Standing; doubts: what could
    not be read, in words."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    stands: Standing = field(default_factory=lambda: Standing(""))
    doubts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the run, as one would type it."""
        return self.folder.name if self.folder.parent.name == "runs" else str(self.folder)

    def curve(self, key: str) -> Curve:
        """A number over the steps; [] of what was never written."""
        return curve(self.lines, key)

    def last(self, key: str) -> float | None:
        """The newest value of a number."""
        found = self.curve(key)
        return found[-1][1] if found else None

    def keys(self, prefix: str) -> list[str]:
        """What was written below a prefix such as "density/", in the order of its first line."""
        return list(dict.fromkeys(key for line in self.lines for key in line if key.startswith(prefix)))


def look(folder: Path) -> Seen:
    """Read a run's files and how it stands; nothing is written, and nothing in them raises."""
    seen = files(folder)
    try:
        seen.stands = standing(folder)
    except InputError as error:
        seen.stands = Standing(str(folder), state="unknown")
        seen.doubts.append(str(error))
    return seen


def files(folder: Path) -> Seen:
    """As `look`, without asking anybody how the run stands."""
    seen = Seen(folder)
    seen.settings, seen.lines, seen.summary = _settings(seen), _lines(seen), _summary(seen)
    return seen


def curve(lines: Iterable[Mapping[str, Any]], key: str) -> Curve:
    """(step, value) of the finite numbers under a key."""
    return [(line["step"], float(line[key])) for line in lines if is_number(line.get(key))]


def is_number(value: object) -> TypeGuard[float]:
    """A finite number, as JSON has them; null stands for one that was not finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thinned(points: Curve, most: int = 400) -> Curve:
    """At most so many points, each the mean of its neighbours; a curve of fewer as it is."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    cut = [points[i : i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], fmean(value for _, value in piece)) for piece in cut]


def phases(lines: Sequence[Line]) -> list[tuple[str, int, int]]:
    """(name, first step, last step) of each phase that was logged, in order."""
    found: dict[str, tuple[int, int]] = {}
    for line in lines:
        name = line["phase"]
        first, last = found.get(name, (line["step"], line["step"]))
        found[name] = (min(first, line["step"]), max(last, line["step"]))
    return [(name, first, last) for name, (first, last) in found.items()]


def _settings(seen: Seen) -> dict[str, Any]:
    try:
        values = read_yaml_file(seen.folder / "config.yaml")
    except InputError as error:
        seen.doubts.append(f"its settings: {error}")
        return {}
    return dict(_flat(values, "")) if isinstance(values, dict) else {}


def _flat(values: Mapping[Any, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value)


def _value(value: Any) -> Any:
    """A setting as Python has it, whatever version of ghostmask knows its type."""
    if isinstance(value, list):
        return tuple(_value(one) for one in value)
    if not isinstance(value, Plain):
        return value
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value, str(value))


def _lines(seen: Seen) -> list[Line]:
    try:
        texts = read_small(seen.folder / "metrics.jsonl", LARGEST).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        seen.doubts.append(f"its metrics.jsonl cannot be read ({error.strerror})")
        return []
    found, broken = [], 0
    for text in texts:
        line = _parsed(text)
        if line is None:
            broken += 1
        else:
            found.append(line)
    broken -= bool(texts) and _parsed(texts[-1]) is None  # the one that is being written
    if broken:
        seen.doubts.append(f"{broken} lines of its metrics.jsonl are damaged and were left out")
    return sorted(found, key=lambda line: line["step"])


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or isinstance(line["step"], bool):
        return None
    return line | {"phase": str(line.get("phase", ""))}


def _summary(seen: Seen) -> dict[str, Any]:
    try:
        summary = json.loads(read_small(seen.folder / "export" / "summary.json"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        seen.doubts.append(f"its export/summary.json cannot be read ({error})")
        return {}
    return summary if isinstance(summary, dict) else {}
