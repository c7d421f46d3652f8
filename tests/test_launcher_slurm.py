"""Are the tasks of `srun ghostmask ...` ranks? On a real Slurm (shared/tools/slurm), where one is running."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        shutil.which("srun") is None or "SLURM_CONF" not in os.environ,
        reason="no Slurm here: start shared/tools/slurm/slurmbox.sh and source its env.sh",
    ),
]

SHOW = """
import dataclasses, json
from ghostmask.engine.launch import read_launch
print(json.dumps(dataclasses.asdict(read_launch())))
"""


def test_tasks_of_srun_are_ranks_of_one_run(tmp_path: Path) -> None:
    start = ["srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-c", SHOW]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120, check=True)
    launches = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda launch: int(launch["rank"]))
    assert [(launch["rank"], launch["size"], launch["local_rank"], launch["local_size"]) for launch in launches] == [
        (0, 4, 0, 2), (1, 4, 1, 2), (2, 4, 0, 2), (3, 4, 1, 2),
    ]  # fmt: skip
    assert len({(launch["address"], launch["port"]) for launch in launches}) == 1

    data = ["model.name=digits_resnet", "data.dataset=digits", f"data.root={tmp_path}", "data.batch_size=64"]
    (tmp_path / "snip.yaml").touch()
    ghostmask = [sys.executable, "-m", "ghostmask"]
    subprocess.run([*ghostmask, "prepare", "digits_probmask", f"data.root={tmp_path}"], timeout=120, check=True)
    find = ["find-mask", str(tmp_path / "snip.yaml"), *data, "mask.method=random", "mask.density=0.1"]
    start = ["srun", "--nodes=2", "--ntasks-per-node=1", *ghostmask, *find, "--out", str(tmp_path / "m.safetensors")]
    done = subprocess.run(start, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "m.safetensors")], "one rank of two prints"
