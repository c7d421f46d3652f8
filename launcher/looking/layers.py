"""What does a report say of each layer: density at the end and over time, FLOPs, probabilities, zeros?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ghostmask.launcher.looking.charts import Map, bars, heat
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


def probability_pictures(seen: Seen) -> list[tuple[bytes, str]]:
    """The probabilities of all weights, and of each layer, when they were logged last; [] of a run without any."""
    found = [(line["step"], _counts(line)) for line in seen.lines]
    step, layers = next(((step, layers) for step, layers in reversed(found) if layers), (0, {}))
    if not layers:
        return []
    total = [sum(column) for column in zip(*layers.values(), strict=True)]
    limits = [(i + 1) / len(total) for i in range(len(total))]
    shares = [[count / sum(counts) for count in counts] for counts in layers.values()]
    number = sum(total)
    ends = (total[0] + total[-1]) / number
    words = (
        f"{number:,.0f} probabilities at step {step:,}; {ends:.1%} lie in the first and the last of {len(total)} bars"
    )
    return [
        (bars("probabilities of all weights", limits, total), words),
        (heat(Map("probabilities of each layer", list(layers), shares, (0.0, limits[-1]), "probability")),
         f"share of the probabilities of each of {len(layers)} layers by their value, at step {step:,}"),
    ]  # fmt: skip


def zeros_rows(seen: Seen) -> list[dict[str, Any]]:
    """A row per activation: its share of exact zeros, as it was logged last; [] where it was not logged."""
    found = [(key[6:], seen.last(key)) for key in seen.keys("zeros/")]
    return [{"name": name, "share": share} for name, share in found if share is not None]


def _counts(line: Mapping[str, Any]) -> dict[str, list[int]]:
    """Layer -> how many of its probabilities lie in each of equal parts of [0, 1]; {} of a line without them."""
    found = {key[12:]: value for key, value in line.items() if key.startswith("probability/")}
    size = max((len(counts) for counts in found.values() if isinstance(counts, list)), default=0)
    return {
        name: counts
        for name, counts in found.items()
        if isinstance(counts, list) and len(counts) == size and all(map(is_number, counts)) and sum(counts) > 0
    }
