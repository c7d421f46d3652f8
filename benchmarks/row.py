"""What is one result of a benchmark, and how are results shown and written?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured (or computed) number beside the number it is compared with.

    value, baseline: in `unit`; baseline and ratio are None where there is nothing to compare with. ratio reads like the
    bar it is held against: how many times faster (`faster`, `more_per_second`), or value / baseline (`share`).
    """

    case: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    note: str = ""


def faster(case: str, value: float, baseline: float, unit: str, note: str) -> Row:
    """A duration; ratio: how many times longer the baseline takes."""
    return Row(case, value, unit, baseline, baseline / value, note)


def more_per_second(case: str, value: float, baseline: float, unit: str, note: str) -> Row:
    """A rate; ratio: how many times the baseline's it is."""
    return Row(case, value, unit, baseline, value / baseline, note)


def share(case: str, value: float, baseline: float, unit: str, note: str) -> Row:
    """An amount (bytes, seconds, calls); ratio: its share of the baseline's."""
    return Row(case, value, unit, baseline, value / baseline, note)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, numbers to four digits."""
    cells = [("case", "value", "unit", "baseline", "ratio", "note")]
    cells += [(r.case, _number(r.value), r.unit, _number(r.baseline), _number(r.ratio), r.note) for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    lines = []
    for case, value, unit, baseline, ratio, note in cells:
        left, right = f"{case:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}", f"{ratio:>{widths[4]}}  {note}"
        lines.append(f"{left}  {baseline:>{widths[3]}}  {right}".rstrip())
    return "\n".join(lines)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """A list of {case, value, unit, baseline, ratio, note}; null where there is no baseline."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
