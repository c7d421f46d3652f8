"""What does a report say of each layer: density at the end and over time, FLOPs, probabilities, zeros?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ghostmask.launcher.looking.charts import Map, bars, heat
from ghostmask.launcher.looking.events import Histogram
from ghostmask.launcher.looking.read import Seen, is_number

MOST_COLUMNS = 200
"""Of a map over time."""


def layer_rows(seen: Seen) -> list[dict[str, Any]]:
    """A row per layer: name, density in [0, 1] or None, its share of the dense and of the sparse FLOPs or None. Of the
    export where there is one, else what was logged last."""
    listed = seen.summary.get("layers")
    layers = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if not layers:
        last = next((line for line in reversed(seen.lines) if any(key.startswith("density/") for key in line)), {})
        layers = [{"name": key[8:], "density": value} for key, value in last.items() if key.startswith("density/")]
    total = {key: sum(one.get(key) or 0 for one in layers) for key in ("flops_dense", "flops_sparse")}
    return [
        {
            "name": str(one.get("name", "?")).removesuffix(".weight"),
            "density": one["density"] if is_number(one.get("density")) else None,
            **{
                key: one[key] / total[key] if is_number(one.get(key)) and total[key] else None
                for key in ("flops_dense", "flops_sparse")
            },
        }
        for one in layers
    ]


def largest(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The largest value of each column of `layer_rows`, which has the longest bar."""
    keys = ("density", "flops_dense", "flops_sparse")
    return {key: max((row[key] for row in rows if row[key] is not None), default=0.0) for key in keys}


def density_map(seen: Seen) -> list[tuple[bytes, str]]:
    """The density of each layer over the steps; [] where fewer than two moments were logged."""
    names = seen.keys("density/")
    lines = [line for line in seen.lines if any(is_number(line.get(name)) for name in names)]
    if len(lines) < 2:
        return []
    lines = lines[:: -(-len(lines) // MOST_COLUMNS)]
    values = [[line[name] if is_number(line.get(name)) else 0.0 for line in lines] for name in names]
    steps = (float(lines[0]["step"]), float(lines[-1]["step"]))
    drawn = heat(Map("density of each layer", [name[8:] for name in names], values, steps, "step"))
    return [(drawn, f"density of each of {len(names)} layers, from step {steps[0]:,.0f} to {steps[1]:,.0f}")]


def probability_pictures(histograms: Mapping[str, tuple[int, Histogram]]) -> list[tuple[bytes, str]]:
    """The probabilities of all weights, and of each layer, when they were logged last; [] of a run without any."""
    found = {n[12:]: (at, h) for n, (at, h) in histograms.items() if n.startswith("probability/") and _is_whole(h)}
    if not found:
        return []
    limits = next(iter(found.values()))[1][0]
    same = {name: counts for name, (_, (bounds, counts)) in found.items() if bounds == limits}
    step = max(at for at, _ in found.values())
    total = [sum(column) for column in zip(*same.values(), strict=True)]
    shares = [[count / sum(counts) for count in counts] for counts in same.values()]
    number = sum(total)
    ends = (total[0] + total[-1]) / number
    words = (
        f"{number:,.0f} probabilities at step {step:,}; {ends:.1%} lie in the first and the last of {len(total)} bars"
    )
    return [
        (bars("probabilities of all weights", limits, total), words),
        (heat(Map("probabilities of each layer", list(same), shares, (0.0, limits[-1]), "probability")),
         f"share of the probabilities of each of {len(same)} layers by their value, at step {step:,}"),
    ]  # fmt: skip


def zeros_rows(seen: Seen) -> list[dict[str, Any]]:
    """A row per activation: its share of exact zeros, as it was logged last; [] where it was not logged."""
    found = [(key[6:], seen.last(key)) for key in seen.keys("zeros/")]
    return [{"name": name, "share": share} for name, share in found if share is not None]


def _is_whole(histogram: Histogram) -> bool:
    limits, counts = histogram
    return len(limits) == len(counts) > 0 and sum(counts) > 0
