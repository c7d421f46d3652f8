"""Is what went wrong in a run said, with what to do, and nothing said where nothing did?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from looking_runs import make_run

from ghostmask.launcher.looking.diagnosis import diagnosis
from ghostmask.launcher.looking.read import files


def test_a_run_in_which_nothing_went_wrong_gets_no_word(tmp_path: Path) -> None:
    assert diagnosis(files(make_run(tmp_path / "run"))) == []


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"decided": 0.5}, "only 50% of the probabilities are within 0.01 of 0 or 1 after 300 steps; mask.lr = 0.06"),
        ({"mask/temperature": 0.4}, "the temperature ended at 0.4, above mask.temperature_end = 0.03"),
        ({"mask/density": 0.3}, "the density ended at 0.3, above mask.density = 0.05"),
        ({"gradient/clip_factor": 0.25}, "clipped in 100% of the logged steps, to 0.25 of their length"),
        ({"speed/data_wait_fraction": 0.4}, "steps waited for data for 40% of the time"),
        ({"speed/checkpoint_stall_fraction": 0.2}, "steps waited for checkpoints for 20% of the time"),
        ({"train/loss": float("nan")}, "the training loss was not finite at step 10"),
    ],
)  # fmt: skip
def test_each_fault_is_named_with_its_numbers(tmp_path: Path, numbers: dict[str, float], words: str) -> None:
    found = diagnosis(files(make_run(tmp_path / "run", **numbers)))  # type: ignore[arg-type]
    assert len(found) == 1
    assert words in found[0]


def test_a_search_that_goes_on_is_not_blamed_for_what_is_not_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False, decided=0.3, **{"mask/temperature": 0.4, "mask/density": 0.3})
    assert diagnosis(files(run)) == []


def test_layers_without_a_weight_are_counted_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / "export" / "summary.json"
    summary = json.loads(file.read_text())
    for i in (1, 3):
        summary["layers"][i] |= {"kept": 0, "density": 0.0}
    file.write_text(json.dumps(summary))
    (text,) = diagnosis(files(run))
    names = f"{summary['layers'][1]['name']}, {summary['layers'][3]['name']}"
    assert f"2 layers have no weight left: {names}" in text


def test_an_accuracy_that_was_lost_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "eval/accuracy" in line]
    scores[-1]["eval/accuracy"] = 0.11
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (text,) = diagnosis(files(run))
    assert f"the accuracy fell from {scores[-2]['eval/accuracy']:.2%} at step 250 to 11.00% at step 300" in text


def test_of_one_phase_only_its_lines_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", decided=0.5)
    assert len(diagnosis(files(run), "search")) == 1
    assert diagnosis(files(run), "finetune") == []
