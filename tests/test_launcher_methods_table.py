"""Does the methods table give every method the same epochs, and go on where a run failed or it was cut off?"""

from __future__ import annotations

from pathlib import Path

import pytest

from ghostmask.engine.errors import InputError, RunStopped
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.methods_table import _cells, _own, _Table
from ghostmask.launcher.settings import load_config

SMALL = [
    "data.dataset=synthetic", "data.num_train=96", "data.num_eval=24", "data.num_classes=4", "data.batch_size=16",
    "train.epochs=2", "finetune.epochs=1", "train.replicas=1",
]  # fmt: skip


def test_every_method_gets_the_same_epochs_and_seed(tmp_path: Path) -> None:
    table = _Table("digits_methods", ["seed=3"], tmp_path, 3)
    for method in ("probmask", "magnitude"):
        config = table.cell(method, "0.02", []).config
        assert (config.train.epochs, config.finetune.epochs, config.seed) == (20, 5, 3)
        assert (config.mask.method, config.mask.density) == (method, 0.02)  # type: ignore[attr-defined]
    for method in ("gmp", "snip", "random"):
        config = table.cell(method, "0.02", ["optim.lr=0.3"]).config
        assert (config.train.epochs, config.finetune.epochs, config.optim.lr) == (25, 0, 0.3)
    dense = table.cell("dense", "", []).config
    assert (dense.train.epochs, dense.run) == (25, str(tmp_path / "dense-seed3"))


def test_a_method_for_trained_networks_gets_one_and_is_tuned_like_the_others(tmp_path: Path) -> None:
    table = _Table("digits_methods", ["seed=3"], tmp_path, 3)
    run = table.cell("mlprune", "0.02", [])
    tuned = load_config("digits_methods").finetune
    assert run.needs is not None
    assert (run.needs.config.mask.method, run.needs.config.train.epochs, run.needs.config.seed) == ("dense", 20, 3)
    assert run.config.mask.path == run.needs.config.run  # type: ignore[attr-defined]
    assert (run.config.train.epochs, run.config.optim.lr, run.config.optim.schedule) == (5, tuned.lr, tuned.schedule)
    assert table.cell("mlprune", "0.1", []).needs == run.needs, "one for all densities"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--methods pbw", "--methods = 'pbw' is not known: did you mean 'magnitude'"),
        ("--methods file", "--methods file: its density is no setting; say what it is to be run with at each density"),
        ("--with lth", "--with = 'lth': give METHOD:key=value or METHOD@DENSITY:key=value"),
        ("--with imp:mask.rewind=1ep", "--with = 'imp' is not known: did you mean 'lth'"),
        ("--methods snip --densities 7", "mask.density = 7.0: give a number in (0, 1]"),
        ("--methods snip --with snip:mask.rewind=1ep", "mask.rewind = 1ep: is not read with mask.method=snip"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(arguments: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run_command(["methods-table", "digits_methods", "--folder", str(tmp_path / "runs"), *arguments.split()])
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "runs").exists()


def test_a_method_without_a_density_is_run_where_its_settings_say_which_one_they_reach(tmp_path: Path) -> None:
    own = _own(["file@0.1:mask.path=a", "file@0.02:mask.path=b", "lth:mask.rewind=1ep"])
    cells = _cells(["dense", "file", "lth"], ["0.5", "0.1"], own)
    assert cells == [("", "dense"), ("0.5", "lth"), ("0.1", "lth"), ("0.1", "file"), ("0.02", "file")]
    config = (
        _Table("digits_methods", ["mask.dense_layers=[fc.weight]"], tmp_path, 0)
        .cell("file", "0.1", own["file", "0.1"])
        .config
    )
    assert (config.mask.path, config.train.epochs, config.run) == ("a", 25, str(tmp_path / "file-0.1-seed0"))  # type: ignore[attr-defined]


def test_a_failed_cell_is_shown_and_stops_no_other_and_what_is_there_is_only_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["methods-table", "digits_methods", *SMALL, f"data.root={tmp_path / 'data'}", "--densities", "0.1"]
    command += ["--seeds", "1", "--jobs", "2", "--folder", "runs"]
    assert run_command(["prepare", *command[1 : len(SMALL) + 3]]) == 0
    capsys.readouterr()
    # lth's rewind point lies behind the end of a round, which only the number of images shows.
    with pytest.raises(RunStopped, match=r"^runs/lth-0\.1-seed0 ended with exit code 2; the same command") as stopped:
        run_command([*command, "--methods", "lth,random", "--with", "lth:mask.rewind=500st"])
    assert stopped.value.exit_code == 2
    out, err = capsys.readouterr()
    head, _, lth, random = out.splitlines()
    assert head.startswith("| method | target | test accuracy |")
    assert lth == "| lth | 0.1 | - | 0 | - | - | - | - | 1 failed |"
    cells = [cell.strip() for cell in random.strip("|").split("|")]
    assert (cells[:2], cells[3], cells[6]) == (["random", "0.1"], "1", "3"), "one seed, three epochs"
    assert "runs/lth-0.1-seed0 FAILED with exit code 2, ghostmask: error: mask.rewind" in err
    before = (tmp_path / "runs/random-0.1-seed0/metrics.jsonl").stat()
    assert run_command([*command, "--methods", "random"]) == 0
    assert capsys.readouterr() == ("\n".join([*out.splitlines()[:2], random]) + "\n", "")
    assert (tmp_path / "runs/random-0.1-seed0/metrics.jsonl").stat() == before
