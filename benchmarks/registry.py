"""The benchmarks by name: to add one, write `rows(bench)` in a file here and add a line."""

from __future__ import annotations

BENCHMARKS = {
    "mask": "benchmarks.mask:rows",
    "projection": "benchmarks.projection:rows",
    "step": "benchmarks.step:rows",
    "loader": "benchmarks.loader:rows",
    "checkpoint": "benchmarks.checkpoint:rows",
    "memory": "benchmarks.memory:rows",
    "communication": "benchmarks.communication:rows",
    "finders": "benchmarks.finders:rows",
}
"""name -> "module:function", imported when it is used; function(Bench) -> list[Row]."""
