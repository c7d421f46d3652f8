"""Does every benchmark run, on the CPU and at tiny sizes, and give rows that mean what they say? No time is judged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_exports import DIGITS, export, network

from ghostmask.benchmarks import textbook
from ghostmask.benchmarks.registry import BENCHMARKS
from ghostmask.benchmarks.row import Row, faster, more_per_second, share, table
from ghostmask.benchmarks.timing import peak_extra_bytes
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import single
from ghostmask.launcher.cli import run_command
from ghostmask.masks.kernels.projection import project_

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "mask": {"mask_operator", "mask_operator_memory", "mask_operator_floor", "mask_operator_slice"},
    "projection": {
        "projection", "projection_start", "projection_floor", "projection_collectives", "projection_error",
        "projection_model", "projection_model_check", "projection_slice",
    },
    "cut": {"largest_global", "largest_layerwise", "cut_dnw", "cut_st3", "cut_feather", "cut_edge_popup"},
    "step": {
        "probmask_step_overhead", "probmask_step_default", "probmask_step_added", "step_images_per_s",
        "dense_images_per_s", "step_where",
    },
    "loader": {
        "loader_imagenet", "loader_imagenet_jpeg", "loader_cifar", "loader_cifar_resident", "loader_decode",
        "loader_decode_torchvision", "loader_decode_large", "loader_decode_fast",
    },
    "export": {"export_size", "export_read", "export_1_thread", "export_all_cores"},
    "checkpoint": {"checkpoint_stall", "checkpoint_first_stall", "checkpoint_share", "checkpoint_bandwidth"},
    "memory": {"memory"},
    "communication": {"communication"},
    "scale": {
        "scale_meet", "scale_group", "scale_first", "scale_second", "scale_objects", "scale_save", "scale_save_again",
        "scale_verify", "scale_load", "scale_files", "scale_index", "scale_sockets", "scale_plan",
        "scale_index_written", "scale_index_read",
    },
    "finders": {
        f"finder_{name}{what}" for name in ("random", "magnitude", "synflow", "snip", "grasp", "mlprune")
        for what in ("", "_memory")
    },
}  # fmt: skip
"""Benchmark -> the cases that its file holds."""
ON_A_GPU = ("mask", "projection", "cut", "finders", "checkpoint", "step")


@pytest.fixture(scope="module")
def gpu_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that benchmarks/gpu.sh filled, tried on the CPU at tiny sizes."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = {**os.environ, "BENCH": "--quick --device cpu", "PYTHON": sys.executable, "PATIENCE": "3"}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), str(folder)],
        env=environment, capture_output=True, text=True, timeout=290, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(case in done.stdout for name in ON_A_GPU for case in CASES[name])
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    for row in rows:
        assert list(row) == ["case", "value", "unit", "baseline", "ratio", "note", "bar", "met"]
        numbers = [row[key] for key in ("value", "baseline", "ratio") if row[key] is not None]
        assert all(math.isfinite(number) and number >= 0 for number in numbers), row
    return rows


def test_every_benchmark_is_tested_here() -> None:
    assert set(CASES) == set(BENCHMARKS)


@pytest.mark.parametrize("name", ON_A_GPU)
def test_the_gpu_script_writes_the_rows_of_each_benchmark(name: str, gpu_script: Path) -> None:
    rows = rows_of(gpu_script / f"{name}.json")
    assert {row["case"] for row in rows} == {"machine", *CASES[name]}


def test_the_projection_needs_at_most_four_collectives(gpu_script: Path) -> None:
    (row,) = [r for r in rows_of(gpu_script / "projection.json") if r["case"] == "projection_collectives"]
    assert 1 <= row["value"] <= 4


def run_here(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict[str, Any]]:
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    assert run_command(["bench", name, *more, "--quick", "--device", "cpu", "--json", "rows.json"]) == 0
    torch.set_num_threads(threads)
    rows = rows_of(folder / "rows.json")
    assert {row["case"] for row in rows} == {"machine", *CASES[name]}
    return rows[1:]


def test_the_loader_is_timed_beside_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(row["ratio"] > 0 for row in run_here("loader", tmp_path, monkeypatch))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "rows.json"]


def test_a_rank_holds_the_bytes_that_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in run_here("memory", tmp_path, monkeypatch):
        assert row["ratio"] == pytest.approx(1, abs=0.1), row["note"]  # a tensor on a border is held whole


def test_a_sparse_step_sends_what_a_dense_one_does_and_half_of_it_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {
        row["note"].split(": ")[1].split(";")[0]: row["ratio"]
        for row in run_here("communication", tmp_path, monkeypatch)
    }
    assert sent["dense, stage 1"] == pytest.approx(1, abs=0.01)
    # A small network: the projection's tables, of one size for all networks, count here.
    assert sent["probmask, stage 1"] == pytest.approx(1, abs=0.02)
    assert sent["probmask, stage 1, bf16"] == pytest.approx(0.5, abs=0.02)
    assert sent["probmask, stage 1, I = 2"] == pytest.approx(2, abs=0.02)


def test_many_ranks_are_measured_as_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {row["case"]: row["value"] for row in run_here("scale", tmp_path, monkeypatch)}
    assert values["scale_files"] == 2 + 3  # one per rank; index, meta, manifest


def test_the_finders_are_timed_beside_the_memory_they_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run_here("finders", tmp_path, monkeypatch)
    assert all(row["baseline"] == 16_000 and row["ratio"] < 1 for row in rows if row["case"].endswith("_memory"))
    assert all(row["value"] > 0 for row in rows if not row["case"].endswith("_memory"))
    notes = {row["case"]: row["note"] for row in rows}
    assert "2 images at once; the default for ImageNet, 1,000, takes" in notes["finder_grasp"]


def test_all_forms_of_an_export_are_timed_beside_the_dense_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "run", network("digits_resnet", 10, DIGITS, 0.05), "digits_resnet", DIGITS)
    rows = run_here("export", tmp_path, monkeypatch, str(tmp_path / "run"))
    sizes = {row["note"].split(";")[0]: row["ratio"] for row in rows if row["case"] == "export_size"}
    assert sizes["dense"] == 1
    assert sizes["packed, fp16, entropy"] < sizes["packed, fp16, plain"] < 0.12 < sizes["small"] < 1
    for case in ("export_1_thread", "export_all_cores"):
        timed = {row["note"].split(";")[0] for row in rows if row["case"] == case}
        assert {"dense", "safetensors", "small", "small, channels_last", "small, TorchScript"} <= timed
    with pytest.raises(InputError, match="RUN: `ghostmask bench export RUN` measures a run's network"):
        run_command(["bench", "export"])


def test_ratios_read_like_the_bars() -> None:
    assert faster("a", 2.0, 10.0, "ms", "").ratio == 5
    assert more_per_second("b", 10.0, 5.0, "images/s", "").ratio == 2
    assert share("c", 1.0, 4.0, "MB", "").ratio == 0.25
    lines = table([Row("d", 12345.6, "ms"), faster("a", 2.0, 10.0, "ms", "note")]).splitlines()
    assert lines[1].split() == ["d", "12,346", "ms", "-", "-", "-", "-"]
    assert lines[2].split() == ["a", "2", "ms", "10", "5", "-", "-", "note"]


def test_the_textbook_projection_is_the_projection() -> None:
    z = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    expected = textbook.project(z, 900.0)
    project_([[(z, 0)]], [900.0], [len(z)], single())
    assert torch.allclose(z, expected, atol=1e-5)


def test_the_textbook_mask_keeps_a_weight_with_its_probability() -> None:
    torch.manual_seed(0)
    probability = torch.full((100_000,), 0.3)
    (masked,) = textbook.masked_weights([torch.ones(100_000)], [probability], 0.5)
    kept = float((masked >= 0.5).float().mean())
    assert kept == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 100_000))


def test_peak_memory_counts_what_is_held_at_once() -> None:
    megabytes = peak_extra_bytes(lambda: [torch.ones(5_000_000), torch.ones(5_000_000)], torch.device("cpu")) / 1e6
    assert 36 <= megabytes <= 60


def test_cutting_masks_is_held_against_torch_and_against_a_mask_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in run_here("cut", tmp_path, monkeypatch):
        assert row["ratio"] > 0, row
        assert "baseline: torch.topk" in row["note"] or "a mask that stays" in row["note"], row
