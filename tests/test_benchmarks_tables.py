"""Do the tables of runs compare what they say, and refuse results of other settings?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ghostmask.benchmarks import sweep, tost_table
from ghostmask.engine.errors import InputError
from ghostmask.launcher.settings import load_config, to_dict
from ghostmask.models.config import TostConfig

SCORES = {
    (0, "0.1", "snip", "none"): 90.0, (1, "0.1", "snip", "none"): 94.0, (2, "0.1", "snip", "none"): 99.0,
    (0, "0.1", "snip", "all"): 91.0, (1, "0.1", "snip", "all"): 93.0, (2, "0.1", "snip", "all"): None,
}  # fmt: skip


def test_a_row_takes_the_seeds_whose_runs_are_all_there_and_differences_seed_by_seed() -> None:
    *_, row = tost_table.table(SCORES, ["snip"], ["0.1"], ["all"], 3).splitlines()
    assert row == "| snip | 0.1 | 92.00 +- 2.83 | 92.00 +- 1.41, 0.00 +- 1.41 | 2 |"


def test_one_score_has_no_spread() -> None:
    assert [sweep.spread(scores) for scores in ([], [98.5], [98.0, 99.0])] == ["-", "98.50", "98.50 +- 0.71"]


@pytest.mark.parametrize("tweak", tost_table.TWEAKS[1:])
def test_a_tweak_alone_leaves_the_others_off_and_keeps_its_own_settings(tweak: str, tmp_path: Path) -> None:
    settings = ["tost.lrsi_steps=7", "tost.ghost_skip_fraction=0.2"]
    tost = tost_table._config("digits_tost", settings, tmp_path, (0, "0.1", "snip", tweak)).tost
    others = [name for name in tost_table.TWEAKS[1:] if name != tweak]
    assert getattr(tost, tweak)
    assert not any(getattr(tost, name) for name in others)
    assert tost.lrsi_steps == (7 if tweak == "lrsi" else TostConfig().lrsi_steps)
    assert tost.ghost_skip_fraction == (0.2 if tweak == "ghost_skip" else TostConfig().ghost_skip_fraction)


def test_a_trained_mask_comes_from_a_run_without_tost_and_is_trained_with_its_seed(tmp_path: Path) -> None:
    config = tost_table._config("digits_tost", [], tmp_path, (2, "0.1", "lth", "all"))
    source = tost_table._source("digits_tost", [], tmp_path, 2, "0.1", "lth")
    assert (config.mask.method, config.mask.path, config.seed) == ("file", source.run, 2)
    assert (source.mask.method, source.mask.density, source.seed) == ("lth", 0.1, 2)
    assert config.tost.lrsi
    assert source.tost == TostConfig()


def test_the_result_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = load_config("digits_tost", [f"run={tmp_path}"])
    assert sweep.accuracy(config) is None
    (tmp_path / "export").mkdir()
    summary = {"accuracy": 0.5, "config": to_dict(config)}
    (tmp_path / "export" / "summary.json").write_text(json.dumps(summary))
    assert sweep.accuracy(config) == 50
    with pytest.raises(InputError, match="other settings; give another --folder"):
        sweep.accuracy(replace(config, seed=5))
