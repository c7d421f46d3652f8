"""Does torch.compile, with inductor, train what eager does? The network is a plain one, nothing is in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memory_run import CONFIG, complete, configured

from ghostmask.engine.spawn import run_distributed

SHORT = configured(CONFIG, mask={"method": "probmask", "samples": 1}, finetune={"epochs": 1}, train={"epochs": 2})


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("inductor", True)):
        config = configured(SHORT, train={"compile": compiled, "replicas": 1})
        run_distributed(complete, 1, str(tmp_path / name), config)
    eager, inductor = losses(tmp_path / "eager"), losses(tmp_path / "inductor")
    assert len(eager) == 12
    assert inductor == pytest.approx(eager, abs=1e-4)
