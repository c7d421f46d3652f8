"""ghostmask report: one HTML file that shows a run, opens from disk and needs no network."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostmask.engine.errors import output
from ghostmask.launcher.locate import writing_to
from ghostmask.launcher.looking.diagnosis import diagnosis, not_looked_at
from ghostmask.launcher.looking.events import Start, read_starts
from ghostmask.launcher.looking.layers import density_map, largest, layer_rows, probability_pictures, zeros_rows
from ghostmask.launcher.looking.read import Seen, look, phases
from ghostmask.launcher.looking.runs import age, progress, written
from ghostmask.launcher.looking.wanted import require
from ghostmask.launcher.values import as_text

TEMPLATE = "report.html.j2"
"""Beside this file."""


@dataclass(frozen=True)
class Picture:
    """A drawing, and what it shows in words, for who does not see it."""

    svg: bytes
    words: str

    @property
    def address(self) -> str:
        """The picture itself, for an <img>."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def report(folder: Path, out: Path) -> int:
    """Write the report of the run in `folder` to `out`, whatever state it is in; nothing else is written. Returns 0."""
    require("jinja2", "matplotlib")
    text = page(look(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing_to("--out", out) as writing:
        writing.write_text(text, encoding="utf-8")
    output(str(out))
    return 0


def page(seen: Seen) -> str:
    """The HTML of a run."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        name=seen.name, folder=seen.folder, result=result_rows(seen), warnings=[*seen.doubts, *diagnosis(seen)],
        not_looked_at=not_looked_at(seen),
        settings=[(key, as_text(value)) for key, value in seen.settings.items()],
        curves=curve_pictures(seen), layers=layer_rows(seen),
        density=[Picture(svg, words) for svg, words in density_map(seen)],
        probabilities=[Picture(svg, words) for svg, words in probability_pictures(seen)],
        zeros=zeros_rows(seen), starts=[start_row(start) for start in read_starts(seen.folder)],
        most=largest(layer_rows(seen)),
        attempts=[attempt_row(a) for a in seen.stands.attempts], made=_time(time.time()),
    )  # fmt: skip


def result_rows(seen: Seen) -> list[tuple[str, str]]:
    """What came out, and how the run stands."""
    stands, summary = seen.stands, seen.summary
    step, accuracy, density = progress(stands)
    rows = [
        ("state", f"{stands.state}{f' on {stands.where}' if stands.where else ''}"), ("why", stands.why),
        ("step", step), ("phase", stands.phase), ("test accuracy", accuracy),
        ("top-5 accuracy", _percent(summary.get("top5"))), ("density", density),
        ("weights kept", _of(summary, "kept", "prunable")),
        ("FLOPs, sparse of dense", _of(summary, "flops_sparse", "flops_dense")),
        ("mask method", str(seen.settings.get("mask.method", ""))),
        ("network", str(seen.settings.get("model.name", ""))), ("dataset", str(seen.settings.get("data.dataset", ""))),
        ("last written", age(time.time() - written(seen.folder)) if written(seen.folder) else ""),
    ]  # fmt: skip
    return [(name, text) for name, text in rows if text]


def curve_pictures(seen: Seen) -> list[tuple[str, list[Picture]]]:
    """(heading, its pictures) of everything that has a curve."""
    ends = [last for _, _, last in phases(seen.lines)][:-1]
    state = [key for key in seen.keys("gradient/") if not key.endswith(("clip_factor", "limit_share"))]
    sections = [
        ("Accuracy and loss", [
            ("accuracy", {"test": "eval/accuracy", "training": "train/accuracy", "test, top-5": "eval/top5"}, False),
            ("loss", {"test": "eval/loss", "training": "train/loss"}, True),
        ]),
        ("Mask", [
            ("density", {"mask": "mask/density", "target": "mask/density_target"}, True),
            ("share of decided probabilities", {"decided": "mask/decided_fraction"}, False),
            ("temperature", {"temperature": "mask/temperature"}, False),
        ]),
        ("Gradients", [
            ("gradient norms", {key.removeprefix("gradient/"): key for key in state}, True),
            ("what clipping left of the gradient (1: not clipped)", {"factor": "gradient/clip_factor"}, False),
            ("learning rates", {key.removeprefix("lr/"): key for key in seen.keys("lr/")}, True),
        ]),
        ("Speed", [
            ("images per second", {"images/s": "speed/images_per_s"}, False),
            ("share of the time that steps waited",
             {"for data": "speed/data_wait_fraction", "for checkpoints": "speed/checkpoint_stall_fraction"}, False),
        ]),
    ]  # fmt: skip
    drawn = [(heading, _drawn(seen, wanted, ends)) for heading, wanted in sections]
    return [(heading, pictures) for heading, pictures in drawn if pictures]


def start_row(start: Start) -> dict[str, str]:
    """One line of the table of starts."""
    what = f"went on after step {start.after:,}" if start.after else "from the beginning"
    return {
        "began": _time(start.began), "what": what, "host": start.host,
        "last": f"{start.last:,}", "hours": f"{(start.ended - start.began) / 3600:.2f}",
    }  # fmt: skip


def attempt_row(attempt: dict[str, Any]) -> str:
    """A line of the job's record in words."""
    words = [f"{key} {value}" for key, value in attempt.items() if key in ("job", "restart", "event", "code")]
    said = str(attempt.get("said", "")).strip().splitlines()
    at = attempt.get("time")
    return f"{_time(at) if isinstance(at, int | float) else ''} {', '.join(words)}{f': {said[0]}' if said else ''}"


def _drawn(seen: Seen, wanted: Sequence[tuple[str, dict[str, str], bool]], ends: Sequence[int]) -> list[Picture]:
    from ghostmask.launcher.looking.charts import Panel, panels

    pictures = []
    for title, keys, logarithmic in wanted:
        curves = {name: points for name, key in keys.items() if (points := seen.curve(key))}
        if curves:
            last = "; ".join(f"{name} {points[-1][1]:.4g} at step {points[-1][0]:,}" for name, points in curves.items())
            pictures.append(Picture(panels([Panel(title, curves, logarithmic, ends)]), f"{title} over steps: {last}"))
    return pictures


def _percent(value: object) -> str:
    return f"{value:.2%}" if isinstance(value, int | float) else ""


def _of(summary: dict[str, Any], part: str, whole: str) -> str:
    some, all_of = summary.get(part), summary.get(whole)
    if not isinstance(some, int) or not isinstance(all_of, int) or not all_of:
        return ""
    return f"{some:,} of {all_of:,} ({some / all_of:.2%})"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
