"""Does train.profile write a trace of a few steps that shows the parts of a step?"""

from __future__ import annotations

import json
from pathlib import Path

from memory_run import CONFIG, complete, configured, memory_run

from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World

SHORT = configured(CONFIG, checkpoint={"every_steps": 0, "asynchronous": False}, train={"eval_every": 9})


def profiled(world: World, folder: str) -> list[str]:
    run, saved = memory_run(world, Path(folder), configured(SHORT, train={"profile": True}))
    run.execute(saved)
    run.close()
    return sorted(path.name.split(".")[0] for path in (Path(folder) / "profile").iterdir())


def test_every_rank_traces_three_steps_of_each_phase(tmp_path: Path) -> None:
    names, _ = run_distributed(profiled, 2, str(tmp_path))
    assert names == ["finetune-rank0", "finetune-rank1", "search-rank0", "search-rank1"]
    (trace,) = (tmp_path / "profile").glob("search-rank0.*.pt.trace.json")
    found = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    samples, groups = 2, 1  # conv4 has nothing but prunable weights
    assert found.count("forward") == 3 * samples * 2  # two parts of four on each of two ranks
    assert found.count("chain rule") == 3 * samples * groups
    assert found.count("optimizer") == found.count("constraint") == 3 * groups
    assert found.count("parameters") == 3 * samples * groups


def test_a_run_without_the_setting_writes_no_trace(tmp_path: Path) -> None:
    run_distributed(complete, 1, str(tmp_path), configured(SHORT, train={"epochs": 1}, finetune={"epochs": 0}))
    assert not (tmp_path / "profile").exists()
