"""The benchmarks by name: to add one, write `rows(bench)` in a file here and add a line."""

from __future__ import annotations

BENCHMARKS = {
    "mask": "ghostmask.benchmarks.mask:rows",
    "projection": "ghostmask.benchmarks.projection:rows",
    "cut": "ghostmask.benchmarks.cut:rows",
    "step": "ghostmask.benchmarks.step:rows",
    "loader": "ghostmask.benchmarks.loader:rows",
    "checkpoint": "ghostmask.benchmarks.checkpoint:rows",
    "memory": "ghostmask.benchmarks.memory:rows",
    "communication": "ghostmask.benchmarks.communication:rows",
    "finders": "ghostmask.benchmarks.finders:rows",
    "export": "ghostmask.benchmarks.export:rows",
    "scale": "ghostmask.benchmarks.scale:rows",
}
"""name -> "module:function", imported when it is used; function(Bench) -> list[Row]."""
