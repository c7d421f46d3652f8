"""Do the tables of benchmarks and of runs compare what they say, and refuse what they cannot compare?"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ghostmask.benchmarks.registry import BENCHMARKS
from ghostmask.benchmarks.row import Row, faster, more_per_second, not_met, share, table, write_json
from ghostmask.benchmarks.timing import Bench
from ghostmask.engine.errors import InputError
from ghostmask.launcher import tost_table
from ghostmask.launcher.cells import accuracy
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.settings import load_config, to_dict
from ghostmask.launcher.table import spread
from ghostmask.models.config import TostConfig

SCORES = {
    (0, "0.1", "snip", "none"): 90.0, (1, "0.1", "snip", "none"): 94.0, (2, "0.1", "snip", "none"): 99.0,
    (0, "0.1", "snip", "all"): 91.0, (1, "0.1", "snip", "all"): 93.0, (2, "0.1", "snip", "all"): None,
}  # fmt: skip
ROWS = [
    Row("load", 1.5, "processes"),
    faster("fast", 2.0, 10.0, "ms", "at its bar", bar=5),
    faster("slow", 2.0, 10.0, "ms", "below", bar=5.01),
    more_per_second("rate", 10.0, 4.0, "images/s", "above", bar=2),
    share("bytes", 1.0, 4.0, "MB", "at its bar", bar=0.25),
    share("stall", 1000.0, 4000.0, "ms", "over", bar=0.2),
    share("free", 1.0, 4.0, "MB", "without a bar"),
]


def some_rows(_: Bench) -> list[Row]:
    """A benchmark whose rows are given."""
    return ROWS


def test_rates_and_times_meet_a_bar_from_above_and_shares_from_below() -> None:
    assert [row.met for row in ROWS] == [None, True, False, True, True, False, None]
    assert not_met(ROWS) == ["slow: 5, bar 5.01", "stall: 0.25, bar 0.2"]


def test_the_table_and_the_json_say_whether_each_bar_is_met(tmp_path: Path) -> None:
    lines = [line.split() for line in table(ROWS).splitlines()]
    assert lines[0] == ["case", "value", "unit", "baseline", "ratio", "bar", "met", "note"]
    assert lines[1] == ["load", "1.5", "processes", "-", "-", "-", "-"]
    assert lines[3] == ["slow", "2", "ms", "10", "5", "5.01", "no", "below"]
    assert lines[4][-3:] == ["2", "yes", "above"]
    write_json(ROWS, tmp_path / "rows.json")
    assert [Row(**row) for row in json.loads((tmp_path / "rows.json").read_text())] == ROWS


@pytest.mark.parametrize(
    ("rows", "options", "code"), [(ROWS, [], 0), (ROWS, ["--strict"], 1), (ROWS[:2], ["--strict"], 0)]
)
def test_a_bar_that_is_not_met_is_an_exit_code_with_strict_only(
    rows: list[Row], options: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BENCHMARKS, "mask", f"{__name__}:some_rows")
    monkeypatch.setattr(sys.modules[__name__], "ROWS", rows)
    threads = torch.get_num_threads()
    assert run_command(["bench", "mask", "--device", "cpu", *options]) == code
    torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["case", "machine", *(row.case for row in rows)]
    said = [line for line in err.splitlines() if "loading torch" not in line]
    assert said == (["ghostmask: bar not met: slow: 5, bar 5.01; stall: 0.25, bar 0.2"] if code else [])


def test_a_sweep_shows_what_is_trained_and_asks_for_the_data_that_the_others_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["digits_tost", f"data.root={tmp_path / 'nothing'}", "train.threads=1"]
    varied = ["--vary", "mask.density=0.1,0.05", "--vary", "optim.lr=0.1", "--seeds", "2", "--folder", str(tmp_path)]
    for density, seed in itertools.product((0.1, 0.05), (0, 1)):
        run = tmp_path / f"digits_tost-{density}-0.1-seed{seed}"
        own = [f"mask.density={density}", "optim.lr=0.1", f"seed={seed}", f"run={run}"]
        summary = {
            "accuracy": 0.9 + density + seed / 100,
            "density": density,
            **({"top5": 0.8 + density} if density == 0.1 else {}),
            **({"flops_dense": 200, "flops_sparse": 31} if density == 0.1 else {}),
            "config": to_dict(load_config(settings[0], settings[1:] + own)),
        }
        (run / "export").mkdir(parents=True)
        (run / "export" / "summary.json").write_text(json.dumps(summary))
        if density == 0.1:
            lines = [{"step": 1, "samples": 40 * n, "epoch": 2 * n - 1, "speed/images_per_s": 8.0 / n} for n in (1, 2)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_command(["sweep", *settings, *varied]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| config | mask.density | optim.lr | test accuracy | top-5 | seeds | density | FLOPs | epochs | seconds "
        "| not finished |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| digits_tost | 0.1 | 0.1 | 100.50 +- 0.71 | 90.00 +- 0.00 | 2 | 0.1 | 15.50% | 4 | 15 |  |",
        "| digits_tost | 0.05 | 0.1 | 95.50 +- 0.71 | - | 2 | 0.05 | - | - | - |  |",
    ]
    twice = ["--vary", "mask.density=0.1,0.1", *varied[2:]]
    assert run_command(["sweep", settings[0], *settings, *twice]) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    shown = "| digits_tost | 0.1 | 0.1 | 100.50 +- 0.71 | 90.00 +- 0.00 | 2 | 0.1 | 15.50% | 4 | 15 |  |"
    assert row == shown, "its seeds are no more"
    (run / "export" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"data\.root = .*run `ghostmask prepare CONFIG`"):
        run_command(["sweep", *settings, *varied])


def test_a_sweep_finds_a_wrong_setting_of_its_last_run_before_it_starts_the_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mask\.density = 7"):
        run_command(["sweep", "digits_tost", "--vary", "mask.density=0.1,7", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_row_takes_the_seeds_whose_runs_are_all_there_and_differences_seed_by_seed() -> None:
    *_, row = tost_table.table(SCORES, ["snip"], ["0.1"], ["all"], 3).splitlines()
    assert row == "| snip | 0.1 | 92.00 +- 2.83 | 92.00 +- 1.41, 0.00 +- 1.41 | 2 |"


def test_one_score_has_no_spread() -> None:
    assert [spread(scores) for scores in ([], [98.5], [98.0, 99.0])] == ["-", "98.50", "98.50 +- 0.71"]


@pytest.mark.parametrize("tweak", tost_table.TWEAKS[1:])
def test_a_tweak_alone_leaves_the_others_off_and_keeps_its_own_settings(tweak: str, tmp_path: Path) -> None:
    settings = ["tost.lrsi_steps=7", "tost.ghost_skip_fraction=0.2"]
    tost = tost_table._run("digits_tost", settings, tmp_path, (0, "0.1", "snip", tweak)).config.tost
    others = [name for name in tost_table.TWEAKS[1:] if name != tweak]
    assert getattr(tost, tweak)
    assert not any(getattr(tost, name) for name in others)
    assert tost.lrsi_steps == (7 if tweak == "lrsi" else TostConfig().lrsi_steps)
    assert tost.ghost_skip_fraction == (0.2 if tweak == "ghost_skip" else TostConfig().ghost_skip_fraction)


def test_a_trained_mask_comes_from_a_run_without_tost_and_is_trained_with_its_seed(tmp_path: Path) -> None:
    config = tost_table._run("digits_tost", [], tmp_path, (2, "0.1", "lth", "all")).config
    source = tost_table._source("digits_tost", [], tmp_path, 2, "0.1", "lth").config
    assert to_dict(config.mask) | {"method": "file", "path": source.run} == to_dict(config.mask)
    assert config.seed == 2
    assert to_dict(source.mask) | {"method": "lth", "density": 0.1} == to_dict(source.mask)
    assert source.seed == 2
    assert config.tost.lrsi
    assert source.tost == TostConfig()


def test_the_result_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = load_config("digits_tost", [f"run={tmp_path}"])
    assert accuracy(config) is None
    (tmp_path / "export").mkdir()
    summary = {"accuracy": 0.5, "config": to_dict(config)}
    (tmp_path / "export" / "summary.json").write_text(json.dumps(summary))
    assert accuracy(config) == 50
    with pytest.raises(InputError, match=r"other settings \(seed: 0 .*, 5 given\); give another --folder"):
        accuracy(replace(config, seed=5))
