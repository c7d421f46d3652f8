"""Does a command work, or say one line, where its streams are closed or its working directory is gone?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m ghostmask"


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("closed", [">&- <&-", ">&- 2>&- <&-"])
def test_closed_streams_change_neither_the_exit_code_nor_what_the_open_ones_say(closed: str, tmp_path: Path) -> None:
    assert shell(f"{COMMAND} show methods {closed}", tmp_path).returncode == 0
    wrong = shell(f"{COMMAND} show method {closed}", tmp_path)
    assert wrong.returncode == 2
    assert ("invalid choice: 'method'" in wrong.stderr) == ("2>&-" not in closed)
    assert len(wrong.stderr.splitlines()) == (0 if "2>&-" in closed else 1)


def test_no_file_of_ours_becomes_a_closed_standard_output(tmp_path: Path) -> None:
    script = (
        "import os; from ghostmask.launcher.process import open_standard_streams; open_standard_streams(); "
        "import sys; sys.stdin.read(); file = open('metrics', 'w'); os.write(1, b'noise'); os.write(2, b'noise'); "
        "print('more'); file.write('own')"
    )
    assert shell(f'{sys.executable} -c "{script}" >&- 2>&- <&-', tmp_path).returncode == 0
    assert (tmp_path / "metrics").read_text() == "own"


def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path) -> None:
    done = shell(f"mkdir gone; cd gone; rmdir ../gone; {COMMAND} train digits_probmask", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "ghostmask: error: the working directory is not there any more; cd to one that is\n"


def test_without_a_home_a_tilde_is_one_line(tmp_path: Path) -> None:
    done = shell(f"HOME= {COMMAND} show config run=x 'data.root=~/data'", tmp_path)
    assert done.returncode == 2
    assert "data.root = '~/data': the home folder of this user is not known; write ./~/data" in done.stderr


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    script = "from ghostmask.launcher.process import open_standard_streams as o; o(); print(chr(0x65e5), chr(0xdcff))"
    done = shell(f'PYTHONIOENCODING=ascii {sys.executable} -c "{script}"', tmp_path)
    assert (done.returncode, done.stdout) == (0, "\\u65e5 \\udcff\n")


def test_output_that_a_full_disk_does_not_take_is_an_error_of_a_command_that_shows_something(tmp_path: Path) -> None:
    done = shell(f"{COMMAND} show methods > /dev/full", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "ghostmask: error: the output could not be written (No space left on device)\n"


def test_a_run_whose_log_is_on_a_full_disk_goes_on_to_its_end(tmp_path: Path) -> None:
    made = shell(f"{COMMAND} prepare digits_probmask data.root=. > /dev/null", tmp_path)
    assert made.returncode == 0, made.stderr
    train = f"{COMMAND} train digits_probmask run=./r data.root=. train.epochs=2 finetune.epochs=0 --ranks 2"
    assert shell(f"{train} > /dev/full 2>&1", tmp_path).returncode == 0
    assert (tmp_path / "r" / "export" / "summary.json").exists()


def test_what_ended_a_command_is_said_though_nobody_reads_what_it_had_printed() -> None:
    script = (
        "import sys; from ghostmask.engine.errors import InputError, tell; from ghostmask.launcher.main import _end; "
        "tell('a table', sys.stdout); sys.exit(_end(InputError('no disk'), 0))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    start = [sys.executable, "-c", script]
    done = subprocess.run(start, stdout=writing, stderr=subprocess.PIPE, text=True, env=env, check=False)
    os.close(writing)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "ghostmask: error: no disk\n"
