"""Does a second `prepare` say that it waits, and may there be file systems without locks?"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from ghostmask.data_pipelines.writing.prepare import _alone


def test_who_waits_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entered = threading.Event()

    def second() -> None:
        with _alone(tmp_path / ".lock"):
            entered.set()

    with _alone(tmp_path / ".lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set()
    assert f"another process writes .beton files to {tmp_path}; waiting" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"), _alone(tmp_path / ".lock"):
            pass
        return
    with _alone(tmp_path / ".lock"):
        assert "has no locks" in capsys.readouterr().err
