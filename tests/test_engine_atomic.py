"""Does a replaced file hold the old content or the new one, whatever happens while it is written?"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ghostmask.engine.atomic import replacing, sync


def test_the_new_content_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    target.write_text("old")
    with replacing(target) as writing:
        writing.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.json"]


def test_an_exception_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    target.write_text("old")

    def write_half() -> None:
        with replacing(target) as writing:
            writing.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_kill_leaves_the_old_content_and_the_next_call_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    target.write_text("old")
    code = """
import os, signal, sys
from pathlib import Path
from ghostmask.engine.atomic import replacing, sync
with replacing(Path(sys.argv[1])) as writing:
    writing.write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    with replacing(target) as writing:
        writing.write_text("new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize(("code", "passed_over"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_is_no_error_and_a_failing_one_is(
    code: int, passed_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if passed_over:
        sync(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync(tmp_path)
