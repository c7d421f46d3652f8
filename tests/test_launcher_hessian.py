"""Does `ghostmask hessian RUN` write the curvature along a run's checkpoints, from the command line on?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from memory_data import MemoryData
from memory_run import CONFIG, complete, configured
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.hessian import measure
from ghostmask.launcher.run import Shares
from ghostmask.launcher.settings import to_yaml
from ghostmask.models.config import TOST_PRESETS

COMMANDS = """
import sys
from ghostmask.launcher.cli import run_command
run_command(["prepare", sys.argv[1] + "/config.yaml"])
run_command(["hessian", sys.argv[1], "--top", "2", "--batches", "1"])
"""


def test_the_command_writes_the_eigenvalues_at_every_checkpoint(tmp_path: Path) -> None:
    config = configured(
        CONFIG, mask={"method": "random"}, model={"name": "digits_resnet"}, checkpoint={"keep": 2},
        finetune={"epochs": 0}, tost={**TOST_PRESETS["all"], "lrsi_steps": 2},
        data={"dataset": "synthetic", "num_train": 96, "num_eval": 8, "num_classes": 4, "image_size": 8,
              "batch_size": 24, "root": str(tmp_path)},
    )  # fmt: skip
    run = tmp_path / "run"
    run_distributed(complete, 1, str(run), config)
    (run / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c", COMMANDS, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    lines = [json.loads(line) for line in (run / "hessian" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [9, 12]
    for line in lines:
        found = [line["hessian/eigenvalue_1"], line["hessian/eigenvalue_2"]]
        assert found[0] > found[1] > 0
        assert f"step {line['step']}  train epoch 2  largest eigenvalues  {found[0]:.4g}  {found[1]:.4g}" in done.stdout
    events = EventAccumulator(str(run / "hessian"))
    events.Reload()
    assert [event.step for event in events.Scalars("hessian/eigenvalue_2")] == [9, 12]


def spectra(world: World, folder: str, config: RunConfig) -> list[tuple[int, list[float]]]:
    """(step, eigenvalues) at the checkpoints of a run in memory."""
    shares = Shares.of(config, world)
    data = MemoryData(world, parts=shares.plain.parts)
    found = measure(Path(folder), Path(folder) / "hessian", config, world, data, shares, top=2, num_batches=1)
    return [(step, spectrum.eigenvalues) for step, spectrum in found]


def test_the_eigenvalues_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """At checkpoints of a search (two noise groups, batch norm) and of fine-tuning, made on 2 ranks."""
    config = configured(
        CONFIG, model={"name": "digits_resnet"}, mask={"noises": 2}, checkpoint={"keep": 3}, finetune={"epochs": 1},
        tost={"ghost_skip": True},
    )  # fmt: skip
    run_distributed(complete, 2, str(tmp_path), config)
    two = run_distributed(spectra, 2, str(tmp_path), config)
    one = run_distributed(spectra, 1, str(tmp_path), config)[0]
    assert [step for step, _ in one] == [step for step, _ in two[0]] == [12, 15, 16]
    for (_, alone), (_, together), (_, beside) in zip(one, *two, strict=True):
        assert together == beside
        assert alone == pytest.approx(together, rel=1e-3)
