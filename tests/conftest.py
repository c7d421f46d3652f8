"""Which environment do all tests share? One thread per process, cheap tests first, a folder for each, shared data."""

from __future__ import annotations

import atexit
import getpass
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ON_SLURM = "launcher_cluster"
"""How the files begin whose tests share a Slurm: of which a machine bears one."""
ORDER = (ON_SLURM, "project", "engine", "models", "masks", "data_pipelines", "benchmarks", "launcher")
"""Packages in the order of their tests: first what mostly waits, for others go beside it; then what fails in
milliseconds, before what starts training runs."""
NEEDED_BYTES = 3 << 30
"""Free in the folder for temporary files: about twice what the tests were seen to hold at once."""


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before the first import of torch, for this process and for the ranks that tests start.

    Ranks and tests share few cores: one thread each is faster than all of them each. Tests are for CPUs, with more
    ranks than there may be GPUs; those for GPUs are run by themselves.
    """
    worker = hasattr(config, "workerinput")  # of `pytest -n`, whose folder it has
    if not worker:
        _use_own_temporary_folder()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    if not all("test_project_cuda" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if worker or not config.getoption("numprocesses", default=None):
        from ghostmask.engine.spawn import PRELOAD, fork_server

        fork_server(
            *PRELOAD, "ghostmask.data_pipelines.writing.writer", "torchvision.transforms.v2"
        )  # one server for all tests of a process: it imports once


def _use_own_temporary_folder() -> None:
    """What tests and the processes that they kill leave in the folder for temporary files is removed at the end.

    Folders of failed tests stay, and are named with the failure. A disk that would get full in the middle (which fails
    every test after that) is refused before the first.
    """
    parent = tempfile.gettempdir()
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        needed = f"{NEEDED_BYTES >> 30} GiB free in {parent}, and there are {free / 2**30:.1f}"
        pytest.exit(f"the tests need {needed}: free some, or set TMPDIR to a larger disk", returncode=2)
    folder = tempfile.mkdtemp(prefix="ghostmask-tests-")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{parent}/torchinductor_{getpass.getuser()}")  # stays
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    atexit.register(_remove_unless_failed, Path(folder), os.getpid())


def _remove_unless_failed(folder: Path, owner: int) -> None:
    """At the end of the process: after pytest, and after multiprocessing has left its folder."""
    if os.getpid() == owner and not any(folder.glob("pytest-of-*/pytest-*")):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n`: a file's tests share a worker, for they share fixtures, and so do all those on Slurm."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return ON_SLURM if Path(file).name.startswith(f"test_{ON_SLURM}") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by package, in ORDER; inside a package the order of files and tests stays."""
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    name = item.path.stem.removeprefix("test_")
    return next((i for i, package in enumerate(ORDER) if name.startswith(package)), len(ORDER))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in its own empty folder: runs and data that lie in the checkout decide nothing."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder with data and documents beside the checkout; a test that uses it is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no shared folder beside the checkout")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
