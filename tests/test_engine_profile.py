"""Does train.profile write a trace of a few steps that shows the parts of a step, and do bf16 gradients train alike?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from memory_run import CONFIG, complete, configured, memory_run
from torch import Tensor

from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World
from ghostmask.masks.methods.probmask import ProbMask

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
    passes = CONFIG.mask.samples
    assert found.count("forward") == 3 * passes
    assert found.count("optimizer") == 3 * 2  # weights, probabilities
    assert found.count("projection") == 3
    assert any(name.startswith("ghostmask::") for name in found)


def test_a_run_without_the_setting_writes_no_trace(tmp_path: Path) -> None:
    run_distributed(complete, 1, str(tmp_path), configured(SHORT, train={"epochs": 1}, finetune={"epochs": 0}))
    assert not (tmp_path / "profile").exists()


def searched(world: World, folder: str, bf16: bool) -> tuple[Tensor, str]:
    """Every probability after one epoch of the search, in which the budget does not bind yet."""
    config = configured(SHORT, mask={"gradient_bf16": bf16}, train={"epochs": 1}, finetune={"epochs": 0})
    run, saved = memory_run(world, Path(folder), config)
    run.execute(saved)
    assert isinstance(run.method, ProbMask)
    flat = torch.cat([s.detach().reshape(-1) for s in run.method.relaxed.probabilities().values()])
    run.close()
    return flat, hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def test_bf16_gradients_leave_ranks_equal_and_the_probabilities_close(tmp_path: Path) -> None:
    (usual, _), _ = run_distributed(searched, 2, str(tmp_path / "usual"), False)
    (halved, digest), (_, other) = run_distributed(searched, 2, str(tmp_path / "halved"), True)
    assert digest == other
    assert not torch.equal(usual, halved), "the gradients were not rounded"
    moved = (1 - usual).abs().mean()
    assert (usual - halved).abs().mean() < 0.05 * moved
