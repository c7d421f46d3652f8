"""What is one result of a benchmark, does it meet its bar, and how are results shown and written?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

COLUMNS = {"case": "<", "value": ">", "unit": "<", "baseline": ">", "ratio": ">", "bar": ">", "met": "<", "note": "<"}
"""Name -> the side that its texts stand on."""


@dataclass(frozen=True)
class Row:
    """One measured (or computed) number beside the number it is compared with.

    value, baseline: in `unit`; baseline and ratio are None where there is nothing to compare with. ratio reads like the
    bar it is held against: how many times faster (`faster`, `more_per_second`), or value / baseline (`share`). bar: the
    least (`faster`, `more_per_second`) or largest (`share`) ratio asked for, and met whether it is; None without a bar.
    """

    case: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    note: str = ""
    bar: float | None = None
    met: bool | None = None


def faster(case: str, value: float, baseline: float, unit: str, note: str, bar: float | None = None) -> Row:
    """A duration; ratio: how many times longer the baseline takes, at least `bar`."""
    return _at_least(Row(case, value, unit, baseline, baseline / value, note, bar))


def more_per_second(case: str, value: float, baseline: float, unit: str, note: str, bar: float | None = None) -> Row:
    """A rate; ratio: how many times the baseline's it is, at least `bar`."""
    return _at_least(Row(case, value, unit, baseline, value / baseline, note, bar))


def share(case: str, value: float, baseline: float, unit: str, note: str, bar: float | None = None) -> Row:
    """An amount (bytes, seconds, calls); ratio: its share of the baseline's, at most `bar`."""
    ratio = value / baseline
    return Row(case, value, unit, baseline, ratio, note, bar, None if bar is None else ratio <= bar)


def not_met(rows: Sequence[Row]) -> list[str]:
    """What each row says whose bar is not met, such as "mask_operator: 9.4, bar 10"."""
    return [f"{row.case}: {_number(row.ratio)}, bar {_number(row.bar)}" for row in rows if row.met is False]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, numbers to four digits."""
    cells = [tuple(COLUMNS)]
    for r in rows:
        numbers = map(_number, (r.baseline, r.ratio, r.bar))
        cells.append((r.case, _number(r.value), r.unit, *numbers, _yes(r.met), r.note))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[-1] = 0
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, COLUMNS.values(), widths, strict=True))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """A list of {case, value, unit, baseline, ratio, note, bar, met}; null where there is no baseline or no bar."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n")


def _at_least(row: Row) -> Row:
    met = None if row.bar is None or row.ratio is None else row.ratio >= row.bar
    return replace(row, met=met)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _yes(met: bool | None) -> str:
    return {None: "-", True: "yes", False: "no"}[met]
