"""Is a run the same run on any number of ranks and at any ZeRO stage: the same losses, and in the end the same bits?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, Outcome, complete, configured, losses
from safetensors.torch import save_file

from ghostmask.engine.spawn import run_distributed
from ghostmask.launcher.config import RunConfig
from ghostmask.masks.drawn import random_mask
from ghostmask.masks.mask_file import write_masks
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model
from ghostmask.models.config import TOST_PRESETS

SHORT = configured(
    CONFIG, model={"name": "digits_resnet"}, train={"epochs": 2}, finetune={"epochs": 1},
    checkpoint={"every_steps": 0, "asynchronous": False}, optim={"clip": 1.0},
)  # fmt: skip
"""V = 4 parts with batch norm, 8 steps and for some methods 4 of fine-tuning; joint clipping at work."""
TOST = {**TOST_PRESETS["all"], "ghost_skip_fraction": 0.7, "swish_fraction": 0.6, "lrsi_steps": 3}
RECIPE: dict[str, Any] = {
    "model": {"blurpool": True, "zero_init_last": True},
    "optim": {"decay_norms": False, "lars": True, "lars_trust": 0.02, "scale_lr": "sqrt", "lr": 1.0},
    "augment": {"randaugment": 2, "mixup": 0.3, "cutmix": 1.0, "mix_fraction": 0.7},
    "ema": {"decay": 0.8},
    "train": {"eval_flip": True},
}
"""Every option that changes what a step computes; with a teacher (`config_of`)."""

CASES: dict[str, dict[str, Any]] = {
    "probmask": {},
    "probmask two noises": {"mask": {"noises": 2, "samples": 2}},
    "probmask four noises": {"mask": {"noises": 4, "constraint": "layerwise"}},
    "gmp": {"mask": {"method": "gmp"}},
    "dnw": {"mask": {"method": "dnw"}},
    "st3": {"mask": {"method": "st3", "sigma": True}},
    "feather": {"mask": {"method": "feather", "density": 0.04}, "tost": TOST, "finetune": {"epochs": 0}},
    "edge_popup": {
        "mask": {"method": "edge_popup", "constraint": "global", "min_per_layer": 3},
        "finetune": {"epochs": 0},
    },
    "str": {"mask": {"method": "str"}},
    "sparse_vd two noises": {"mask": {"method": "sparse_vd", "noises": 2}},
    "l0 of channels": {"mask": {"method": "l0", "gates": "channel", "noises": 2}, "ema": {"decay": 0.5}},
    "magnitude": {"mask": {"method": "magnitude"}},
    "dnw of a power": {"mask": {"method": "dnw", "power": 3.0}, "ema": {"decay": 0.5}},
    "lth": {"mask": {"method": "lth", "rewind": "1ep"}},
    "rigl": {"mask": {"method": "rigl", "update_every": 3, "end_fraction": 1.0}},
    "set": {"mask": {"method": "set"}},
    "acdc": {"mask": {"method": "acdc"}},
    "rigl recipe": {"mask": {"method": "rigl", "update_every": 3}, "tost": TOST, **RECIPE},
    "snip": {"mask": {"method": "snip"}},
    "file": {"mask": {"method": "file"}},
    "tost": {"mask": {"method": "dense"}, "tost": TOST},
    "probmask tost": {"mask": {"noises": 2}, "tost": TOST},
    "gmp recipe": {"mask": {"method": "gmp"}, **RECIPE},
    "probmask recipe": {"mask": {"noises": 2}, "tost": {"label_smoothing": 0.1}, **RECIPE},
}
OTHERS = {
    "probmask": [(2, 2), (4, 0)],
    "probmask two noises": [(2, 1), (4, 2), (4, 0)],
    "probmask four noises": [(2, 0), (4, 1)],
    "gmp": [(2, 0), (4, 2)],
    "dnw": [(2, 1), (4, 0)],
    "st3": [(2, 2), (4, 0)],
    "feather": [(2, 0), (4, 1)],
    "edge_popup": [(2, 2), (4, 1)],
    "str": [(4, 1)],
    "sparse_vd two noises": [(4, 0)],
    "l0 of channels": [(4, 1)],
    "magnitude": [(2, 2)],
    "dnw of a power": [(4, 1)],
    "lth": [(4, 1)],
    "rigl": [(2, 0), (4, 2)],
    "set": [(4, 1)],
    "acdc": [(2, 1), (4, 0)],
    "rigl recipe": [(4, 1)],
    "snip": [(2, 0), (4, 1)],
    "file": [(4, 0)],
    "tost": [(2, 1), (4, 2)],
    "probmask tost": [(4, 1)],
    "gmp recipe": [(2, 2)],
    "probmask recipe": [(4, 0)],
}
"""(ranks, ZeRO stage) that are held against 1 rank at stage 1."""


def config_of(name: str, folder: Path) -> RunConfig:
    case = CASES[name]
    if name == "file":
        weights = prunable_weights(build_model(SHORT.model, 4, MemoryData.image_shape, seed=3))
        path = folder / "mask.safetensors"
        write_masks(path, {n: random_mask(w, w.numel() // 10, 1, n) for n, w in weights.items()}, {})
        case = {"mask": {"method": "file", "path": str(path)}}
    if "recipe" in name:
        path = folder / "teacher.safetensors"
        save_file(
            build_model(replace(SHORT.model, blurpool=True), 4, MemoryData.image_shape, seed=9).state_dict(), path
        )
        case = {**case, "distill": {"path": str(path), "alpha": 0.3}}
    return configured(SHORT, **{section: dict(values) for section, values in case.items()})


def run(config: RunConfig, folder: Path, ranks: int, stage: int) -> tuple[Outcome, list[float]]:
    outcomes: list[Outcome] = run_distributed(
        complete, ranks, str(folder), configured(config, train={"zero_stage": stage})
    )
    assert len({o.digest for o in outcomes}) == 1, "ranks ended with different weights"
    return outcomes[0], losses(folder)


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_run_on_any_number_of_ranks(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    alone, wanted = run(config, tmp_path / "alone", 1, 1)
    assert len(wanted) >= 8
    for ranks, stage in OTHERS[name]:
        outcome, found = run(config, tmp_path / f"{ranks} {stage}", ranks, stage)
        assert found == pytest.approx(wanted, abs=1e-6), (ranks, stage)
        assert different(outcome, alone) == [], (ranks, stage)
        assert outcome.digest == alone.digest


def different(a: Outcome, b: Outcome) -> list[str]:
    """The names of the tensors of which any bit differs."""
    pairs = [(n, t, b.weights[n]) for n, t in a.weights.items()] + [(n, m, b.masks[n]) for n, m in a.masks.items()]
    return [name for name, x, y in pairs if not torch.equal(x, y)]
