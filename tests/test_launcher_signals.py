"""A signal anywhere in a command, from its first import to its end: 75, one line, and the next start goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = ["train.epochs=2", "finetune.epochs=1", "mask.density=0.1", "train.threads=1"]
AT_FUNCTION = """
import os, signal, sys, threading, time
file, function, number, *command = sys.argv[1:]
main_thread = threading.get_ident()
def watch():
    while True:
        frame = sys._current_frames()[main_thread]
        while frame is not None:
            if frame.f_code.co_filename.endswith(file) and frame.f_code.co_name == function:
                print("signal sent", file=sys.stderr, flush=True)
                return os.kill(os.getpid(), getattr(signal, number))
            frame = frame.f_back
        time.sleep(0.0005)
sys.setswitchinterval(0.0005)
threading.Thread(target=watch, daemon=True).start()
from ghostmask.launcher.main import main
code = main(command)
print("ended", time.monotonic(), file=sys.stderr)
sys.exit(code)
"""
"""Runs a command, and sends its process a signal as soon as its main thread is inside a function of a file."""


def at(file: str, function: str, number: str, *command: str) -> tuple[int, list[str], float]:
    """Exit code, what was said after the signal was sent, and how long the process took from then on."""
    start = [sys.executable, "-c", AT_FUNCTION, file, function, number, *command]
    with subprocess.Popen(start, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        before = []
        for line in process.stderr:
            before.append(line)
            if "signal sent" in line:
                break
        sent = time.monotonic()
        said = [line for line in process.stderr.read().splitlines() if not line.startswith("ended")]
        assert process.wait(60) is not None, before
        return process.returncode, said, time.monotonic() - sent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "ghostmask", *command]
    return subprocess.run(start, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert run("prepare", "digits_probmask", f"data.root={folder}").returncode == 0
    return folder


@pytest.mark.soak
@pytest.mark.parametrize(
    ("file", "function", "number"),
    [
        ("launcher/cli.py", "<module>", "SIGTERM"),
        ("launcher/run.py", "open_data", "SIGTERM"),
        ("launcher/run.py", "build_method", "SIGUSR2"),
        ("engine/sharding/zero.py", "shard_model", "SIGTERM"),
        ("engine/evaluation.py", "score", "SIGTERM"),
        ("masks/method.py", "leave", "SIGUSR1"),
        ("launcher/train.py", "finish", "SIGUSR2"),
        ("launcher/open_run.py", "open_owned", "SIGTERM"),
        ("models/rescaling.py", "learn_factors", "SIGTERM"),
    ],
)
def test_train_stops_at_once_and_the_same_command_ends_the_run(
    file: str, function: str, number: str, root: Path, tmp_path: Path
) -> None:
    lrsi = ["tost.lrsi=true"] if "rescaling" in file else []
    command = ["train", "digits_probmask", f"run={tmp_path / 'run'}", f"data.root={root}", *SMALL, *lrsi]
    code, said, took_s = at(file, function, number, *command)
    assert code == 75, said
    assert took_s < 30
    ours = [line for line in said if line.startswith("ghostmask: ")]
    assert len(ours) == 1, said
    assert "run the same command again, without --restart" in ours[0]
    assert not any("Traceback" in line for line in said), said
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert "exported model" in again.stdout


@pytest.mark.soak
@pytest.mark.parametrize(
    ("command", "file", "function"),
    [
        ("train", "checkpoint/store.py", "latest"),
        ("train", "checkpoint/store.py", "load"),
        ("evaluate", "engine/evaluation.py", "score"),
        ("export", "launcher/run.py", "execute"),
        ("hessian", "engine/curvature.py", "top_eigenvalues"),
    ],
)
def test_commands_on_a_run_stop_at_once_and_do_it_when_asked_again(
    command: str, file: str, function: str, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train = ["train", "digits_probmask", f"run={folder}", f"data.root={root}", *SMALL]
    assert run(*train).returncode == 0
    words = train if command == "train" else [command, str(folder)]
    code, said, _ = at(file, function, "SIGTERM", *words)
    assert code == 75, said
    assert said[-1] == "ghostmask: stopped by SIGTERM; run the same command again, without --restart"
    assert run(*words).returncode == 0


def test_find_mask_stops_at_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "snip.yaml").touch()
    settings = ["model.name=digits_resnet", "data.dataset=digits", f"data.root={root}", "data.batch_size=64"]
    mask = ["mask.method=snip", "mask.density=0.1", "--out", str(tmp_path / "m.safetensors")]
    command = ["find-mask", str(tmp_path / "snip.yaml"), *settings, *mask]
    code, said, _ = at("masks/scoring/gradient_scores.py", "gradient", "SIGUSR2", *command)
    assert code == 75, said
    assert said[-1] == "ghostmask: stopped by SIGUSR2; run the same command again, without --restart"
    assert not (tmp_path / "m.safetensors").exists()


def test_a_command_stops_while_torch_is_imported(tmp_path: Path) -> None:
    command = ["train", "digits_probmask", f"run={tmp_path / 'run'}", f"data.root={tmp_path}"]
    code, said, _ = at("torch/__init__.py", "<module>", "SIGUSR1", *command)
    assert (code, said) == (75, ["ghostmask: stopped by SIGUSR1; run the same command again, without --restart"])
