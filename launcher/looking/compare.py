"""ghostmask compare: in which settings do runs differ, what did each reach, and how did they get there?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ghostmask.engine.errors import output
from ghostmask.launcher.locate import writing_to
from ghostmask.launcher.looking.charts import Panel, panels
from ghostmask.launcher.looking.read import Seen, look
from ghostmask.launcher.looking.runs import progress
from ghostmask.launcher.table import markdown
from ghostmask.launcher.values import as_text

CURVES = (
    ("eval/accuracy", "test accuracy"), ("eval/loss", "test loss"), ("train/loss", "training loss"),
    ("mask/density", "density"),
)  # fmt: skip
ALIKE = ("run", "data.root", "data.num_workers", "train.device", "train.threads")
"""Settings that say where a run was made, and not what it is."""


def compare(folders: Sequence[Path], picture: Path) -> int:
    """Print a table of the settings that differ and one of the results, and draw the curves of all runs in `picture`,
    an .svg or .png; returns 0."""
    seen = [look(folder) for folder in folders]
    names = short_names(folders)
    named = list(zip(names, seen, strict=True))
    differing = different(seen)
    if differing:
        output(markdown(["setting", *names], [[key, *values] for key, values in differing]))
    else:
        output("the settings of these runs are the same")
    results = [[name, run.stands.state, *progress(run.stands), _best(run)] for name, run in named]
    output("\n" + markdown(["run", "state", "step", "accuracy", "density", "best accuracy"], results))
    for name, run in named:
        for doubt in run.doubts:
            output(f"{name}: {doubt}")
    drawn = [Panel(title, {name: run.curve(key) for name, run in named}) for key, title in CURVES]
    picture.parent.mkdir(parents=True, exist_ok=True)
    with writing_to("--out", picture) as writing:
        writing.write_bytes(panels([p for p in drawn if any(p.curves.values())], picture.suffix[1:]))
    output(f"\ncurves: {picture}")
    return 0


def short_names(folders: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other one has: x, or a/x beside b/x."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]

    def name(parts: tuple[str, ...]) -> str:
        ends = (parts[-length:] for length in range(1, len(parts)))
        return str(Path(*next((end for end in ends if sum(p[-len(end) :] == end for p in paths) == 1), parts)))

    return [name(parts) for parts in paths]


def different(seen: Sequence[Seen]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) where they are not all equal; "-" in a run that lacks it. Paths and machines
    make no difference."""
    known = {key for run in seen for key in run.settings}
    rows = []
    for key in sorted(known - set(ALIKE)):
        values = [as_text(run.settings[key]) if key in run.settings else "-" for run in seen]
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows


def _best(run: Seen) -> str:
    scores = run.curve("eval/accuracy")
    if not scores:
        return ""
    step, best = max(scores, key=lambda point: point[1])
    return f"{best:.2%} at step {step:,}"
