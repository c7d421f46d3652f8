"""Does an export that is killed, or runs out of disk, leave the earlier files or the new ones, never some of both?"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_exports import DIGITS, export, network

from ghostmask.engine import atomic
from ghostmask.engine.atomic import replacing_folder
from ghostmask.engine.errors import InputError
from ghostmask.engine.spawn import PRELOAD, fork_server
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.exporting.convert import write_format
from ghostmask.launcher.exporting.exported import Options, read_exported
from ghostmask.launcher.exporting.registry import PLAIN

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
"""Python's audit events of what changes a folder; `open` only where it is for writing."""

UNORDERED = ("model.mlmodel",)
"""Core ML's description of a network, the same for both, has its maps in another order in each process."""


def dies_at(number: int, place: Path) -> dict[str, int]:
    """From now on this process kills itself before change `number` of what lies in `place`. Returns a running count."""
    seen = {"changes": 0}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not str(arguments[0]).startswith(str(place)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen["changes"] += 1
        if seen["changes"] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def killed(source: Path, out: Path, name: str, number: int) -> int:
    """Export in a process that kills itself before one of its changes; how many there were where it did not, or 0."""
    counted = out.parent.with_suffix(".count")
    counted.unlink(missing_ok=True)
    process = fork_server(*PRELOAD).Process(target=export_and_die, args=(source, out, name, number, counted))  # type: ignore[attr-defined]
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL or counted.exists()
    return 0 if process.exitcode else int(counted.read_text())


def export_and_die(source: Path, out: Path, name: str, number: int, counted: Path) -> None:
    """In a process of its own, which never comes to its end if `number` is that of a change."""
    torch.set_num_threads(1)
    exported = read_exported(source)
    with contextlib.redirect_stderr(io.StringIO()):
        seen = dies_at(number, out.parent)
        if name == PLAIN:
            export(out, exported.net, "digits_resnet", DIGITS)
        else:
            write_format(exported, out, name, Options())
    counted.write_text(str(seen["changes"]))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Exports of two networks whose files have other contents; all layers are 2:4."""
    folders = []
    for name, factor in (("one", 1.0), ("other", 0.5)):
        net = network("digits_resnet", 10, DIGITS, 0.2)
        with torch.no_grad():
            for weight in (w for w in net.parameters() if w.dim() > 1 and w.shape[1] % 4 == 0):
                weight[:, ::2] = 0
                weight.mul_(factor)
        folders.append(tmp_path_factory.mktemp(name))
        export(folders[-1], net, "digits_resnet", DIGITS)
    return folders[0], folders[1]


ONNX = pytest.param("onnx", marks=pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="needs onnx"))
COREML = pytest.param(
    "coreml", marks=pytest.mark.skipif(importlib.util.find_spec("coremltools") is None, reason="needs coremltools")
)


@pytest.mark.parametrize("name", ["packed", "2:4", "small", ONNX, COREML])
def test_killed_before_any_change_it_leaves_all_earlier_files_or_all_new_ones(
    name: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "place" / "x"
    one, other = sources
    out.parent.mkdir()
    write_format(read_exported(other), out, name, Options())
    new = contents(out)
    changes = killed(one, out, name, 0)
    earlier = contents(out)
    assert changes >= len(earlier) + 2, "a folder, its files, and what is removed"
    left = set()
    slow = name in ("onnx", "coreml")  # seconds each
    for number in (changes,) if slow else range(1, changes + 1):
        assert killed(other, out, name, number) == 0
        now = contents(out)
        assert now.keys() == new.keys(), number
        own = [file for file in new if new[file] != earlier[file] and Path(file).name not in UNORDERED]
        same = {file for file in own if now[file] == earlier[file]}
        assert same in (set(), set(own)), number
        left.add(bool(same))
        if not same:
            break
    assert slow or left == {True, False}, "both ends were reached"
    with replacing_folder(out) as folder:
        (folder / "file").touch()
    assert os.listdir(out.parent) == ["x"], "what kills left is gone"


def test_killed_in_the_first_export_it_leaves_none_or_all_of_it(sources: tuple[Path, Path], tmp_path: Path) -> None:
    one, aside = sources[0], tmp_path / "aside"
    write_format(read_exported(one), aside, "packed", Options())
    changes, found = killed(one, tmp_path / "first" / "x", "packed", 0), set()
    for number in range(1, changes + 2):
        out = tmp_path / str(number) / "x"
        out.parent.mkdir()
        killed(one, out, "packed", number)
        found.add(out.exists())
        assert not out.exists() or contents(out) == contents(aside)
    assert found == {True, False}


def test_killed_at_any_change_a_plain_export_has_earlier_files_new_ones_or_no_summary(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = sources
    out = tmp_path / "place" / "x"
    out.mkdir(parents=True)
    changes, found = killed(one, out, PLAIN, 0), []
    ends = {"earlier": contents(one), "new": contents(other)}
    assert contents(out) == ends["earlier"]
    for number in range(1, changes + 2):
        killed(other, out, PLAIN, number)
        now = {name: digest for name, digest in contents(out).items() if not name.endswith(".writing")}
        where = next((name for name, files in ends.items() if files == now), "no summary")
        assert where != "no summary" or "summary.json" not in now
        found.append(where)
        killed(one, out, PLAIN, 0)
        assert contents(out) == ends["earlier"], "what the kill left is gone"
    assert found == sorted(found, key=["earlier", "no summary", "new"].index)
    assert set(found) == {"earlier", "no summary", "new"}


def test_a_disk_that_is_full_leaves_the_earlier_files_and_is_one_line(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("packed", "2:4", "small"):
        out = tmp_path / name
        write_format(read_exported(sources[0]), out, name, Options())
        earlier, other = contents(out), read_exported(sources[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        try:
            with pytest.raises(InputError, match=r"--out = .*: cannot be written \(File too large\); nothing changed"):
                write_format(other, out, name, Options())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert contents(out) == earlier
        assert sorted(os.listdir(tmp_path)) == sorted({name, *os.listdir(tmp_path)} - {f".{name}.writing"})
    plain = tmp_path / PLAIN
    export(plain, read_exported(sources[0]).net, "digits_resnet", DIGITS)
    earlier = contents(plain)
    small, large = ((plain / name).stat().st_size for name in ("summary.json", "model.safetensors"))
    assert small < 40_000 < large, "the disk is full in the middle"
    net = read_exported(sources[1]).net
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(plain, net, "digits_resnet", DIGITS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(plain) == earlier


def test_where_folders_cannot_be_exchanged_the_earlier_one_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "EXCHANGE", 1 << 20)  # which no file system knows
    out = tmp_path / "x"
    for text in ("one", "two"):
        with replacing_folder(out) as folder:
            (folder / "file").write_text(text)
    assert (os.listdir(tmp_path), (out / "file").read_text()) == (["x"], "two")
    out.rename(tmp_path / ".x.earlier")  # killed between the two steps
    with pytest.raises(RuntimeError, match="half way"), replacing_folder(out):
        raise RuntimeError("half way")
    assert (os.listdir(tmp_path), (out / "file").read_text()) == (["x"], "two")


def test_a_folder_with_others_files_the_working_directory_and_a_mixed_export_are_refused(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, source = tmp_path / "mine" / "notes.txt", str(sources[0])
    mine.parent.mkdir()
    mine.write_text("x")
    monkeypatch.chdir(tmp_path)
    for out, why in (
        ("mine", "holds 'notes.txt', which an export of this format does not write"),
        (".", "is or holds the working directory; give a folder of its own, such as new"),
        (source, "holds 'model.safetensors', which"),
    ):
        with pytest.raises(InputError, match=re.escape(why)):
            run_command(["export", source, "--format", "packed", "--out", out])
    assert (os.listdir("mine"), mine.read_text()) == (["notes.txt"], "x")
    assert run_command(["export", source, "--format", "packed", "--out", "linked"]) == 0
    os.symlink("linked", "link")
    assert run_command(["export", source, "--format", "packed", "--out", "link"]) == 0
    assert Path("link").is_symlink()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file, of in (("model.safetensors", sources[0]), ("summary.json", sources[1])):
        (mixed / file).write_bytes((of / file).read_bytes())
    assert json.loads((mixed / "summary.json").read_text())["file"]["sha256"]
    with pytest.raises(InputError, match=r"its summary.json is of another model.safetensors .*; write both again"):
        run_command(["export", str(mixed), "--format", "packed"])
