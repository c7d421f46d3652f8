"""Does interrupted writing go on from what it can use, and from nothing else?"""

from __future__ import annotations

from pathlib import Path

import pytest

from ghostmask.data_pipelines.writing import journal


def test_samples_written_in_another_format_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = tmp_path / "x.partial"
    partial.write_bytes(bytes(100))
    log = journal.Journal(tmp_path / "x.journal", {"start": 0})
    log.start(journal.sealed([((1, 2), (3, 4), 0, 100, 5, 6, 7, 0), ((2, 2), (3, 4), 50, 100, 5, 6, 7, 0)]))
    assert log.read(partial)["label"].tolist() == [5], "the other one goes on after the file's end"
    assert len(journal.Journal(log.path, {"start": 1}).read(partial)) == 0
    monkeypatch.setattr(journal, "FORMAT", journal.FORMAT + 1)
    assert len(journal.Journal(log.path, {"start": 0}).read(partial)) == 0
