"""Do the Triton kernels give the numbers of the torch forms (interpreted), and do they compile for an H100?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
ROOT = Path(__file__).resolve().parent.parent
CHECKS = [
    "words_are_those_of_the_torch_form",
    "masked_weights_are_those_of_the_torch_form",
    "gradients_are_those_of_the_torch_form",
    "a_weight_has_the_same_bits_in_every_slice",
    "a_nan_probability_is_not_hidden",
    "halves_of_a_key_are_signed_32_bit_numbers",
    "tables_are_those_of_the_torch_form",
    "brackets_are_those_of_the_torch_form",
    "projected_bits_are_those_of_the_torch_form",
    "keys_are_counted_as_by_the_torch_form",
]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """Of one process: Triton decides when it is imported whether kernels are interpreted."""
    if VERSION < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of triton {triton.__version__} does not work with numpy {np.__version__}")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "triton_checks.py")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_every_check_is_looked_at(results: dict[str, str]) -> None:
    assert sorted(results) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted_kernel(results: dict[str, str], check: str) -> None:
    assert results[check] == ""


PLACE = {"numel": "i32", "block": "i32", "offset": "i32", "low_key": "i32", "high_key": "i32"}
KNOBS = {"inverse_temperature": "fp32"}
WEIGHTS = {"weight": "*fp32", "probability": "*fp32"}
GRADIENTS = {"gradient": "*fp32", "slope": "*fp32"}
PIECE = {"z": "*fp32", "numel": "i32"}
KERNELS = [
    ("relaxed_mask_triton", "_masked", {"out": "*bf16"} | WEIGHTS | PLACE | KNOBS, {}),
    ("relaxed_mask_triton", "_masked", {"out": "*fp32"} | WEIGHTS | PLACE | KNOBS, {}),
    ("relaxed_mask_triton", "_gradients", GRADIENTS | WEIGHTS | PLACE | KNOBS, {}),
    (
        "projection_triton", "_histogram",
        PIECE | {"base": "*i64", "tables": "*i64", "blocks": "i32", "bins": "i32"}, {"SHIFT": 10, "SIZE": 2048},
    ),
    (
        "projection_triton", "_add_up",
        {"packed": "*i64", "programs": "i32", "table": "*i64", "columns": "i32"}, {"ROWS": 64, "COLUMNS": 16},
    ),
    (
        "projection_triton", "_narrow",
        {"tables": "*i64", "bins": "i32", "budget": "*fp64", "base": "*i64", "slope": "*i64", "value": "*fp64",
         "lowest": "*fp64"}, {"SHIFT": 10, "SIZE": 1024},
    ),
    (
        "radix_triton", "_count",
        {"keys": "*i32", "numbers": "*i64", "numel": "i32", "bases": "*i64", "tables": "*i32", "num_tables": "i32",
         "cells": "i32", "blocks": "i32", "bins": "i32"}, {"SHIFT": 21, "SEVERAL": True, "SIZE": 2048},
    ),
    ("projection_triton", "_subtract_and_clamp", PIECE | {"threshold": "*fp64", "first_index": "i64"}, {"SIZE": 2048}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "arguments", "constants"), KERNELS, ids=[k[1] for k in KERNELS])
def test_kernel_compiles_for_an_h100(module: str, name: str, arguments: dict, constants: dict) -> None:  # type: ignore[type-arg]
    """Triton brings its own assembler: no GPU is needed for this."""
    import importlib

    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"ghostmask.masks.kernels.{module}"), name)
    values = {n: getattr(tl, v) if isinstance(v, str) else v for n, v in constants.items()}
    places = {(kernel.arg_names.index(n),): v for n, v in values.items()}
    signature = arguments | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=places), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 0
    if name in ("_histogram", "_count") and VERSION >= (
        3,
        9,
    ):  # additions that nobody waits for; 3.6 compiles waiting ones
        assert "red.global" in compiled.asm["ptx"]
        assert "atom.global" not in compiled.asm["ptx"]
