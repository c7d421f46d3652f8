"""ghostmask table: what did several runs reach? Mean and spread over seeds, a line per setting."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ghostmask.engine.atomic import read_small
from ghostmask.engine.errors import InputError, output
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.finished import is_finished
from ghostmask.launcher.folder import read_run
from ghostmask.launcher.locate import writing_to
from ghostmask.launcher.settings import flat
from ghostmask.launcher.values import as_text

NOT_SHOWN = ("run", "seed", "data.root", "train.device", "train.threads", "data.num_workers")
"""Settings that make no other experiment."""
FORMS = {"density": ".4g", "flops": ".2%", "epochs": ".4g", "seconds": ".0f"}
"""Fields of Result whose mean over seeds is shown -> how."""


@dataclass(frozen=True)
class Cell:
    """A run of a table: what its line shows first, its folder, and that of the run that its start was trained in."""

    shown: tuple[str, ...]
    folder: Path
    source: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a finished run reached: accuracy and top5 in percent, density and flops (sparse / dense) in [0, 1]; epochs,
    and seconds of training without starts and evaluations, with those of its source. None: not known."""

    accuracy: float
    top5: float | None
    density: float
    flops: float | None
    epochs: int | None
    seconds: float | None


@dataclass
class Line:
    """Runs that differ by their seed only: their results, and how those stand that have none."""

    results: list[Result] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """What is known of a field of Result, in the order of the runs."""
        return [value for result in self.results if (value := getattr(result, name)) is not None]


def table(runs: Sequence[Path], file: Path | None) -> int:
    """Print a Markdown table of the runs, and write it as CSV to `file`, unless that is None; returns 0.

    A line per setting that differs between them: mean and sample standard deviation of the test accuracy (and of top-5
    accuracy, where some run has one), number of seeds, density, FLOPs, epochs, seconds; runs that are not finished are
    counted with what became of them. Raises InputError for a folder that is no run's.
    """
    settings = [flat(_config(run)) for run in runs]
    keys = sorted({key for values in settings for key in values if key not in NOT_SHOWN and _differs(key, settings)})
    shown = [tuple(as_text(values[key]) if key in values else "-" for key in keys) for values in settings]
    show_lines(keys, [Cell(values, run) for values, run in zip(shown, runs, strict=True)], file)
    return 0


def show_lines(
    columns: Sequence[str], cells: Sequence[Cell], file: Path | None, failed: Container[Path] = ()
) -> None:  # fmt: skip
    """Print a Markdown table (and write a CSV) with a line for all runs that have the same values in `columns`. failed:
    folders of runs of which this process knows that they failed."""
    from ghostmask.launcher.cluster.standing import standing

    lines: dict[tuple[str, ...], Line] = {}
    for cell in cells:
        line = lines.setdefault(cell.shown, Line())
        found = result(cell)
        if found is None:
            line.others.append("failed" if cell.folder in failed else standing(cell.folder).state)
        else:
            line.results.append(found)
    ranked = any(line.values("top5") for line in lines.values())
    head = [*columns, "test accuracy", *(["top-5"] if ranked else []), "seeds", "density", "FLOPs", "epochs", "seconds",
            "not finished"]  # fmt: skip
    rows = [
        [*shown, spread(line.values("accuracy")), *([spread(line.values("top5"))] if ranked else []),
         str(len(line.results)), *(_mean(line, name, form) for name, form in FORMS.items()), _counted(line.others)]
        for shown, line in lines.items()
    ]  # fmt: skip
    output(markdown(head, rows))
    if file is not None:
        _write_csv(file, columns, lines)


def spread(scores: Sequence[float]) -> str:
    """Mean and, of several, sample standard deviation, such as "98.61 +- 0.28"; "-" of none."""
    if not scores:
        return "-"
    mean = f"{statistics.mean(scores):.2f}"
    return f"{mean} +- {statistics.stdev(scores):.2f}" if len(scores) > 1 else mean


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _config(run: Path) -> RunConfig:
    """Of a run that has started, else of its job."""
    submitted = run / "job" / "config.yaml"
    if not (run / "config.yaml").exists() and submitted.exists():
        from ghostmask.launcher.settings import load_config

        return load_config(str(submitted))
    return read_run(run)


def _differs(key: str, settings: Sequence[dict[str, object]]) -> bool:
    return len({as_text(values[key]) if key in values else None for values in settings}) > 1


def result(cell: Cell) -> Result | None:
    """What a finished run reached, None of another. Raises InputError where its summary cannot be read."""
    if not is_finished(cell.folder):
        return None
    try:
        summary = json.loads(read_small(cell.folder / "export" / "summary.json"))
        accuracy, top5, density = float(summary["accuracy"]), summary.get("top5"), float(summary["density"])
        dense = summary.get("flops_dense")
        flops = summary["flops_sparse"] / dense if dense else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"run = {str(cell.folder)!r}: its export/summary.json cannot be read ({error}); export it again"
        ) from None
    trained = [_trained(folder) for folder in (cell.folder, cell.source) if folder is not None]
    known = all(epochs for epochs, _ in trained)
    epochs, seconds = sum(one for one, _ in trained) or None, sum(one for _, one in trained) or None
    return Result(
        100 * accuracy,
        None if top5 is None else 100 * top5,
        density,
        flops,
        *((epochs, seconds) if known else (None,) * 2),
    )


def _trained(run: Path) -> tuple[int, float]:
    """(epochs, seconds) of training that the run's metrics tell of; (0, 0.0) where there are none."""
    epochs, seconds, before = 0, 0.0, 0
    file = run / "metrics.jsonl"
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        line = json.loads(text)
        rate = line.get("speed/images_per_s")
        if rate and "samples" in line:
            seconds, before = seconds + (line["samples"] - before) / rate, line["samples"]
            epochs = line["epoch"] + 1
    return epochs, seconds


def _mean(line: Line, name: str, form: str) -> str:
    values = line.values(name)
    return format(statistics.mean(values), form) if values else "-"


def _counted(states: Sequence[str]) -> str:
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _write_csv(file: Path, keys: Sequence[str], lines: dict[tuple[str, ...], Line]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    means = {"top5": "top5_mean", "density": "density", "flops": "flops", "epochs": "epochs", "seconds": "seconds"}
    writer.writerow([*keys, "accuracy_mean", "accuracy_std", "seeds", *means.values(), "not_finished"])
    for shown, line in lines.items():
        accuracies = line.values("accuracy")
        mean = statistics.mean(accuracies) if accuracies else ""
        std = statistics.stdev(accuracies) if len(accuracies) > 1 else ""
        others = [_mean(line, name, "") if line.values(name) else "" for name in means]
        writer.writerow([*shown, mean, std, len(accuracies), *others, _counted(line.others)])
    with writing_to("--csv", file) as writing:
        writing.write_text(text.getvalue(), encoding="utf-8")
