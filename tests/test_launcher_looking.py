"""Do runs, compare, watch and report show runs as they are: live, damaged, old, read-only, among foreign folders?"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from looking_runs import make_run
from terminal import shown_on_a_terminal

from ghostmask.engine.errors import InputError
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.looking.compare import short_names
from ghostmask.launcher.looking.events import read_starts
from ghostmask.launcher.looking.read import files, thinned
from ghostmask.launcher.looking.watch import Signs, spark, watch

START = [sys.executable, "-m", "ghostmask"]


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command prints that ends well."""
    assert run_command(command) == 0
    return capsys.readouterr().out


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose runs/ holds two runs, and what no run wrote."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "second", overrides=("optim.lr=0.03", "seed=4"), finished=False)
    (tmp_path / "runs" / "photos").mkdir()
    (tmp_path / "runs" / "photos" / "metrics.jsonl").write_bytes(b"\xff\x00 no run's")
    (tmp_path / "runs" / "notes.txt").write_text("x")
    return tmp_path


def test_runs_lists_state_step_accuracy_density_and_age(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.utime(place / "runs" / "first" / "metrics.jsonl", (0, 0))
    for name in ("export/summary.json", "run.json", "config.yaml"):
        os.utime(place / "runs" / "first" / name, (time.time() - 7300,) * 2)
    rows = said(capsys, "runs").splitlines()[2:]
    assert len(rows) == 2, rows
    assert re.match(r"\| runs/second \| stopped \| 250/300 \| 82.50% \| 5.00% \| \d+ s ago \|", rows[0]), rows[0]
    assert re.match(r"\| runs/first \| finished \| 300/300 \| 95.00% \| 5.03% \| 2 h ago \|", rows[1]), rows[1]
    found = json.loads(said(capsys, "runs", "first", "--json"))
    assert found[0]["accuracy"] == 0.95


def test_runs_names_a_damaged_run_and_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs" / "first" / "job.json").write_text("{")
    (place / "runs" / "second" / "metrics.jsonl").write_bytes(os.urandom(2000))
    rows = said(capsys, "runs").splitlines()[2:]
    assert len(rows) == 2
    assert any("runs/first | unknown" in row for row in rows)


def test_compare_prints_what_differs_and_draws_all_curves(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    text = said(capsys, "compare", "first", "second", "--out", "both.svg")
    settings = re.findall(r"^\| (\S+) \| (\S+) \| (\S+) \|$", text, flags=re.M)
    assert ("optim.lr", "0.1", "0.03") in settings
    assert ("seed", "0", "4") in settings
    assert [key for key, *_ in settings if "." in key] == ["optim.lr"]
    assert "| second | stopped | 250/300 |" in text
    svg = (place / "both.svg").read_text()
    for word in ("first", "second", "test accuracy", "training loss", "density"):
        assert word in svg
    assert said(capsys, "compare", "runs", "--out", "both.png")
    assert (place / "both.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="at least two runs"):
        run_command(["compare", "first"])
    with pytest.raises(InputError, match=r"--out = 'a.gif': give a file that ends in .svg or .png"):
        run_command(["compare", "first", "second", "--out", "a.gif"])


def test_watch_follows_a_run_in_plain_lines_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ghostmask.launcher.looking.watch as module
    from ghostmask.engine.lease import Lease

    run = make_run(tmp_path / "run", finished=False, restarts=0)
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(whole[:3]))
    lease = Lease.take(run)

    def go_on() -> None:
        for line in whole[3:]:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(line)
            time.sleep(0.02)
        lease.release()

    writer = threading.Thread(target=go_on)
    writer.start()
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: False, raising=False)
    assert watch(run, every_s=0.01) == 0
    writer.join()
    lines = capsys.readouterr().out.splitlines()
    steps = [int(found.group(1)) for line in lines if (found := re.search(r"step (\d+)/300", line))]
    assert len(steps) >= 3
    assert steps == sorted(steps)
    assert steps[-1] == 250
    assert " running " in lines[0]
    assert " stopped " in lines[-1]


def test_watch_shows_a_terminal_what_it_draws(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    run = make_run(tmp_path / "run", decided=0.5)
    code, seen = shown_on_a_terminal([*START, "watch", str(run)], TERM="xterm", COLUMNS="100")
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    for word in ("finished", "step 300/300", "training loss", "▁", "only 50% of the probabilities"):
        assert word in text, text


def test_a_run_elsewhere_is_over_when_it_gives_no_sign_any_more(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    signs = Signs(run, silent_s=0.2)
    for beat in range(5):
        os.utime(run / "metrics.jsonl", (beat, beat))
        assert not signs.are_over("unknown")
        time.sleep(0.1)
    time.sleep(0.2)
    assert signs.are_over("unknown")
    assert not signs.are_over("queued")
    assert Signs(run).are_over("failed")


def test_looking_at_runs_waits_for_no_torch(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    code = (
        "import sys; from ghostmask.launcher.cli import run_command; "
        f"run_command(['watch', {str(run)!r}, '--once']); run_command(['runs', {str(run)!r}]); "
        f"run_command(['report', {str(run)!r}]); "
        f"run_command(['compare', {str(run)!r}, {str(other)!r}, '--out', {str(tmp_path / 'both.svg')!r}]); "
        "assert not {'torch', 'ffcv', 'deepspeed'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_curve_in_a_line_of_text_rises_with_its_values() -> None:
    assert spark([(i, float(i)) for i in range(8)], 8) == "▁▂▃▄▅▆▇█"
    assert spark([(1, 2.0), (2, 2.0)], 10) == "▁▁"
    assert spark([], 10) == ""
    assert thinned([(i, float(i % 2)) for i in range(1000)], 10)[0] == (99, 0.5)


def lost_settings_and_strange_summary(run: Path) -> None:
    (run / "config.yaml").write_bytes(b"\x00\xff")
    (run / "export" / "summary.json").write_text('{"accuracy": "x", "layers": [{"name": null, "kept": null}, 3]}')


def torn(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40] + b"\n\xff\xfe\n[1]\n7\n" + b'{"step": true}\n{"step": 9, "phase": [1]')


def older(run: Path) -> None:
    """Lines without tags and without most columns, as an older version may have written them."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: line[key] for key in ("step", "train/loss") if key in line} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (run / "export" / "summary.json").write_text(json.dumps({"accuracy": 0.5, "density": 0.1}))
    (run / "config.yaml").write_text("model:\n  name: old\ntrain:\n  accumulation: 4\n")


def no_metrics(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    for file in run.glob("events*"):
        file.write_bytes(os.urandom(3000))


def nothing_but_a_record(run: Path) -> None:
    for path in sorted(run.rglob("*"), reverse=True):
        if path.is_file() and path.name != "run.json":
            path.unlink()


@pytest.mark.parametrize(
    "harm", [lost_settings_and_strange_summary, torn, older, no_metrics, nothing_but_a_record], ids=lambda f: f.__name__
)
def test_a_harmed_run_is_shown_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    harm(run)
    before = contents(run)
    said(capsys, "report", str(run), "--out", str(tmp_path / "seen.html"))
    said(capsys, "watch", str(run), "--once")
    said(capsys, "runs", str(run))
    assert contents(run) == before
    assert '<h2 id="result">' in (tmp_path / "seen.html").read_text()


def test_the_report_of_54_layers_is_one_light_file_that_holds_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", layers=54, restarts=2, decided=0.5)
    before = contents(run)
    assert run_command(["report", str(run)]) == 0
    after = contents(run)
    assert after.pop("report/report.html")
    assert after == before  # nothing else is written
    file = run / "report" / "report.html"
    assert file.stat().st_size < 2e6
    text = file.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)  # nothing from a network, nor from beside it
    for heading in ("Result", "Warnings", "Accuracy and loss", "Mask", "Gradients", "Speed", "Probabilities", "Layers",
                    "Activation sparsity", "Interruptions and resumes", "Settings"):  # fmt: skip
        assert f">{heading}</h2>" in text, heading
    for word in ("only 50% of the probabilities", "layer18.2.conv2", "95.00%", "went on after step 100",
                 "went on after step 200", "from the beginning", "optim.lr"):  # fmt: skip
        assert word in text, word
    table = text.partition('id="layers"')[2].partition('id="zeros"')[0]
    shares = re.findall(r"<td>layer\S+?</td><td>\s*([\d.]+) %.*?</td><td>\s*([\d.]+) %", table, flags=re.S)
    assert len(shares) == 54
    assert sum(float(flops) for _, flops in shares) == pytest.approx(100, abs=0.5)


def test_text_of_a_run_is_no_markup(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "<script>alert(1)</script>")
    (run / "metrics.jsonl").unlink()  # pictures take seconds
    assert run_command(["report", str(run), "--out", str(tmp_path / "seen.html")]) == 0
    assert "<script>" not in (tmp_path / "seen.html").read_text()


def test_a_run_whose_folder_takes_nothing_is_shown_elsewhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "report").write_text("")  # in the way, for root too, who may write to a read-only folder
    with pytest.raises(InputError, match="--out = "):
        run_command(["report", str(run)])
    assert run_command(["report", str(run), "--out", str(tmp_path / "new" / "seen.html")]) == 0


def test_starts_and_their_places_are_read_from_the_event_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", restarts=2)
    starts = read_starts(run)
    assert [(start.after, start.last) for start in starts] == [(0, 100), (100, 200), (200, 300)]
    assert {start.host for start in starts} == {os.uname().nodename}
    torn_file = sorted(run.glob("events*"))[-1]
    torn_file.write_bytes(torn_file.read_bytes()[:-7])
    assert len(read_starts(run)) == 3


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    seen = files(make_run(tmp_path / "run", overrides=("optim.lr=1e-05",)))
    assert seen.settings["optim.lr"] == 1e-5
    assert seen.settings["train.channels_last"] is True
    assert seen.settings["model.name"] == "digits_resnet"
    assert seen.doubts == []


OFF_THE_WAY = (
    "first/checkpoints/step-1", "first/export/small", "second/report", "data/photos", ".old", "a/b/c/d/e/f/g"
)  # fmt: skip
"""Where no runs are looked for."""


def test_runs_finds_runs_at_any_depth_and_looks_into_nothing_that_holds_none(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("methods/rigl-0.1-seed0", "a/b/c/deep", "group/report/weekly"):
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "run.json").write_text("{}")
    written = (place / "runs" / "first" / "config.yaml").read_text()
    for name, text in (("a/planned", written), ("tool", "model: x\nlr: 1\n"), ("first/job", written)):
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "config.yaml").write_text(text)
    for name in OFF_THE_WAY:
        (place / "runs" / name).mkdir(parents=True, exist_ok=True)
        (place / "runs" / name / "run.json").write_text("{}")
    (place / "runs" / "a" / "itself").symlink_to(place / "runs" / "a")
    looked, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(Path(path)) or scan(path))
    found = {Path(run["run"]) for run in json.loads(said(capsys, "runs", "--json"))}
    names = ("first", "second", "methods/rigl-0.1-seed0", "a/b/c/deep", "group/report/weekly", "a/planned")
    assert found == {Path("runs", name) for name in names}
    assert not [path for path in looked if {"checkpoints", "export", "data", ".old"} & set(path.parts)]
    assert "runs/a/planned | new |" in said(capsys, "runs", "a")
    assert [run["run"] for run in json.loads(said(capsys, "status", "methods", "--json"))] == [
        "runs/methods/rigl-0.1-seed0"
    ]
    with pytest.raises(InputError, match=r"known: .*runs/a/planned"):
        run_command(["evaluate", "planed"])


def test_compared_runs_of_one_name_are_told_apart(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name, rate in (("a/x", 0.1), ("b/x", 0.03)):
        make_run(place / "runs" / name, overrides=(f"optim.lr={rate}",))
    text = said(capsys, "compare", "runs/a/x", "runs/b/x", "first", "--out", "three.svg")
    assert "| setting | a/x | b/x | first |" in text
    assert "| optim.lr | 0.1 | 0.03 | 0.1 |" in text
    assert "| b/x | finished |" in text
    svg = (place / "three.svg").read_text()
    assert svg.count(">a/x<") == svg.count(">b/x<") == svg.count(">first<") > 0
    with pytest.raises(InputError, match="at least two runs"):
        run_command(["compare", "first", "runs/first", str(place / "runs" / "first")])
    folders = [Path(name) for name in ("/q/x", "/p/q/x", "/x", "runs/a", "y")]
    assert short_names(folders) == ["/q/x", "p/q/x", "/x", "a", "y"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["table", "runs", "--csv"], "--csv"), (["sweep", "digits_probmask", "--csv"], "--csv"),
        (["methods-table", "digits_methods", "--csv"], "--csv"), (["bench", "step", "--quick", "--json"], "--json"),
        (["evaluate", "first", "--per-class"], "--per-class"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_written_are_said_before_anything_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], option: str
) -> None:
    from ghostmask.launcher import cells

    monkeypatch.setattr(cells, "train_missing", lambda *_: pytest.fail("a run was started"))
    os.mkfifo(place / "pipe")
    (place / "file").touch()
    wrong = {"no/x.csv": "there is no folder 'no'", "runs": "is a folder", "pipe": "is a pipe or device",
             "file/x.csv": "there is no folder 'file'", "/proc/x.csv": "nothing can be written to /proc"}  # fmt: skip
    for file, why in wrong.items():
        with pytest.raises(InputError, match=f"{option} = '{file}': {why}") as error:
            run_command([*command, file])
        assert "\n" not in str(error.value)


def test_a_table_s_file_is_replaced_whole(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "real.csv").write_text("old")
    (place / "table.csv").symlink_to("real.csv")
    text = said(capsys, "table", "runs", "--csv", "table.csv")
    assert "| optim.lr |" in text
    assert (place / "table.csv").is_symlink()
    assert (place / "real.csv").read_text().startswith("optim.lr,accuracy_mean")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(InputError, match=r"--csv = 'table.csv': cannot be written \(File too large\)"):
            run_command(["table", "runs", "--csv", "table.csv"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (place / "real.csv").read_text().startswith("optim.lr,accuracy_mean")
    assert sorted(os.listdir(place)) == ["real.csv", "runs", "table.csv"]
