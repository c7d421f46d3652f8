"""A trained network to start from: what mask.path names, read into the plain network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ghostmask.engine.checkpoint.state_file import read_state_dict
from ghostmask.engine.config import require
from ghostmask.engine.errors import bad_value


def load_trained(net: nn.Module, path: str) -> None:
    """Fill `net` from a run folder (its export), a .safetensors, or a .pt with a state dict. Raises InputError."""
    file = Path(path)
    if file.is_dir():
        file = file / "export" / "model.safetensors"
    if not file.is_file():
        raise bad_value("mask.path", path, f"{file} is missing; give a finished run's folder, a .safetensors or a .pt")
    try:
        net.load_state_dict(read_state_dict(file, "mask.path"), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise bad_value("mask.path", path, f"does not hold this network's weights ({reason})") from None


def check_without_main_phase(path: str, run: Any) -> None:
    """Raise InputError where settings of a main phase are given that mask.path leaves out. run: a RunConfig."""
    given = run.given("train") & {"epochs"}
    require(
        run.train.epochs == 0 or not given,
        "train.epochs", run.train.epochs, "mask.path replaces the dense training; set train.epochs=0",
    )  # fmt: skip
    for name in sorted(run.given("optim") & {"lr", "schedule", "warmup", "milestones", "gamma"}):
        raise run.not_read("optim", name, f"mask.path={path}", "finetune.lr, finetune.schedule")
    for name in sorted(run.given("tost") & {"ghost_skip", "ghost_swish", "lrsi"}):
        raise run.not_read("tost", name, f"mask.path={path}", "a method with a main phase")
