"""The closing table of a run: what came out, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghostmask.engine.evaluation import accuracy_text


def closing_table(summary: Mapping[str, Any], folder: Path, export: Path, images_per_s: float) -> str:
    """Two columns to print. summary: as launcher.export writes it to `export`; folder: of the run; images_per_s: mean
    while training, 0 if nothing was trained."""
    rows = [
        ("dense parameters (prunable)", f"{summary['prunable']:,}"),
        ("weights kept", f"{summary['kept']:,}"),
        ("density", f"{summary['density']:.4%}"),
        ("test accuracy", accuracy_text(summary["accuracy"], summary.get("top5"))),
        ("FLOPs, sparse / dense", f"{summary['flops_sparse']:,} / {summary['flops_dense']:,}"),
        *([("images/s while training", f"{images_per_s:,.0f}")] if images_per_s else []),
        ("TensorBoard", f"tensorboard --logdir {folder.parent}"),
        ("report", f"ghostmask report {folder}"),
        ("checkpoint", str(folder / "checkpoints")),
        ("exported model", str(export / "model.safetensors")),
    ]
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])
