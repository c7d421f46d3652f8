"""How are a run's curves, bars and maps drawn? With matplotlib, as SVG or PNG, in one look for all pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ghostmask.launcher.looking.read import Curve, thinned
from ghostmask.launcher.looking.wanted import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 4.6, 2.7
"""Of a picture, in inches: one that a telephone shows at about its own size."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files
    "svg.hashsalt": "ghostmask",
    "text.parse_math": False,  # names are names, with any number of dollars
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Panel:
    """Curves over the steps in one pair of axes. logarithmic: of the values; ends: steps at which a phase ended."""

    title: str
    curves: Mapping[str, Curve]
    logarithmic: bool = False
    ends: Sequence[int] = field(default_factory=tuple)


@dataclass(frozen=True)
class Map:
    """values[row][column] in colours. rows: names, few of which are written; columns: ends of the axis below."""

    title: str
    rows: Sequence[str]
    values: Sequence[Sequence[float]]
    columns: tuple[float, float]
    below: str
    logarithmic: bool = True


def panels(drawn: Sequence[Panel], kind: str = "svg") -> bytes:
    """The panels one below the other. kind: svg or png. Raises InputError without matplotlib."""
    with _figure(kind, max(1, len(drawn))) as (axes, out):
        for ax, panel in zip(axes, drawn, strict=False):
            _curves(ax, panel)
    return out.getvalue()


def bars(title: str, limits: Sequence[float], counts: Sequence[float], kind: str = "svg") -> bytes:
    """How values in [0, limits[-1]] are spread; the counts on a logarithmic scale."""
    with _figure(kind, 1) as ((ax,), out):
        lower = [0.0, *limits[:-1]]
        widths = [high - low for low, high in zip(lower, limits, strict=True)]
        ax.bar(lower, counts, widths, align="edge", log=True)
        ax.set_title(title, loc="left")
    return out.getvalue()


def heat(drawn: Map, kind: str = "svg") -> bytes:
    """A map, its first row at the top."""
    from matplotlib.colors import LogNorm

    height = min(6.0, HEIGHT + 0.05 * len(drawn.rows))
    with _figure(kind, 1, height) as ((ax,), out):
        positive = [value for row in drawn.values for value in row if value > 0]
        norm = LogNorm(min(positive), max(positive)) if drawn.logarithmic and positive else None
        edges = (*drawn.columns, len(drawn.rows) - 0.5, -0.5)
        image = ax.imshow(
            drawn.values, aspect="auto", norm=norm, extent=edges, interpolation="nearest", cmap="viridis"
        )  # fmt: skip
        every = max(1, -(-len(drawn.rows) // 12))
        ax.set_yticks(range(0, len(drawn.rows), every), [_short(name) for name in drawn.rows[::every]], fontsize=7)
        ax.grid(False)
        ax.set_xlabel(drawn.below)
        ax.set_title(drawn.title, loc="left")
        ax.figure.colorbar(image, ax=ax, pad=0.02)
    return out.getvalue()


@contextmanager
def _figure(kind: str, rows: int, height: float = HEIGHT) -> Iterator[tuple[Sequence[Axes], io.BytesIO]]:
    require("matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * rows))
        yield list(figure.subplots(rows, 1, squeeze=False)[:, 0]), out
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _curves(ax: Axes, panel: Panel) -> None:
    for name, points in panel.curves.items():
        if points:
            steps, values = zip(*thinned(points), strict=True)
            ax.plot(steps, values, label=name, linewidth=1.2, marker="." if len(points) < 30 else "")
    if panel.logarithmic and any(value > 0 for points in panel.curves.values() for _, value in points):
        ax.set_yscale("log")
    for step in panel.ends:
        ax.axvline(step, color="grey", linewidth=0.8, linestyle=":")
    ax.set_title(panel.title, loc="left")
    ax.set_xlabel("step")
    if len(panel.curves) > 1:
        ax.legend(fontsize=8)


def _short(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= 24 else f"...{name[-21:]}"
