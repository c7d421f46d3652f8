"""Is what went wrong in a run said, with what to do, and nothing said where nothing did?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from looking_runs import make_run

from ghostmask.launcher.looking.diagnosis import diagnosis, not_looked_at
from ghostmask.launcher.looking.read import files
from ghostmask.launcher.settings import load_config


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


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"method": "l0", "penalty": 1.0}, "mask.dense_layers leaves them as they are"),
        ({"method": "probmask", "constraint": "global"}, "mask.constraint=layerwise keeps some of each"),
        ({"method": "gmp", "constraint": "global", "min_per_layer": 0}, "mask.min_per_layer=1 keeps some"),
        (
            {"method": "snip", "constraint": "layerwise", "min_per_layer": 0},
            "mask.dense_layers leaves them as they are",
        ),
        ({"method": "random", "min_per_layer": 0}, "mask.min_per_layer=1 keeps some"),
    ],
)
def test_of_emptied_layers_the_setting_is_named_that_the_method_reads(
    settings: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    seen = files(make_run(tmp_path / "run"))
    seen.summary["layers"][1]["kept"] = 0
    (text,) = diagnosis(replace(seen, settings={f"mask.{name}": value for name, value in settings.items()}))
    assert text.endswith(f"; {advice}")
    name, _, value = advice.partition(" ")[0].removeprefix("mask.").partition("=")
    given = settings | {name: value or "[fc.weight]"}
    load_config(None, [f"mask.{name}={value}" for name, value in given.items()])  # which is read, and not refused


def test_a_share_of_multiplications_is_not_taken_for_one_of_weights(tmp_path: Path) -> None:
    seen = files(make_run(tmp_path / "run", **{"mask/density": 0.3}))
    assert len(diagnosis(seen)) == 1
    assert diagnosis(replace(seen, settings={**seen.settings, "mask.budget": "flops"})) == []


def test_what_too_little_was_logged_of_is_not_said_to_be_well(tmp_path: Path) -> None:
    seen = files(make_run(tmp_path / "run"))
    seen = replace(seen, settings={**seen.settings, "optim.clip": 1.0})
    rare = [line for line in seen.lines if line["step"] % 100 == 0]
    few = [{key: value for key, value in line.items() if not key.startswith("speed/")} for line in rare]
    assert [text.partition(" (")[0] for text in not_looked_at(replace(seen, lines=few))] == [
        "clipping",
        "waiting for data",
    ]
    assert not_looked_at(seen) == []


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
