"""Is a run finished when it has exported its last step, and not when somebody exported it on the way?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ghostmask.launcher.cluster.standing import standing
from ghostmask.launcher.finished import is_finished


def run_with(folder: Path, text: str | None) -> Path:
    (folder / "export").mkdir(parents=True)
    if text is not None:
        (folder / "export" / "summary.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        (None, False),
        (json.dumps({"accuracy": 0.5, "density": 0.1, "run": {"step": 40, "steps": 40}}), True),
        (json.dumps({"accuracy": 0.5, "density": 0.1, "run": {"step": 39, "steps": 40}}), False),
        (json.dumps({"accuracy": 0.5, "density": 0.1}), True),  # of a version that exported finished runs only
        ("{", True),
        ("[]", True),
    ],
)
def test_a_run_is_finished_when_it_has_exported_its_last_step(tmp_path: Path, text: str | None, finished: bool) -> None:
    run = run_with(tmp_path / "run", text)
    assert is_finished(run) == finished
    (run / "metrics.jsonl").write_text("")
    assert (standing(run).state == "finished") == finished
