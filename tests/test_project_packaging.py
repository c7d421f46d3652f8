"""Is what is tracked, built and installed the project and nothing else?"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import ghostmask

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "configs", "data_pipelines", "engine", "launcher", "masks", "models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every file that git would give a new clone, those not committed yet included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_distribution_cannot_be_uploaded() -> None:
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]


def test_the_constraints_satisfy_every_requirement() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "names and versions only"
    pinned = {normal(name): version for name, version in (line.split("==") for line in lines)}
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        if requirement.name != PROJECT["name"]:
            version = pinned.get(normal(requirement.name))
            assert version, f"{requirement.name} is not in constraints.txt"
            assert requirement.specifier.contains(version), f"constraints.txt: {requirement.name} {version}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return Path(path)


def contents(wheel: Path) -> list[str]:
    """The names of the files in a wheel, without what describes it."""
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)


def test_the_wheel_holds_each_file_once_under_the_one_name_and_nothing_else(wheel: Path) -> None:
    names = contents(wheel)
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    expected = {f"ghostmask/{path.relative_to(ROOT)}" for path in sources if path.parent.name != "__pycache__"}
    expected |= {f"ghostmask/{path.name}" for path in (ROOT / "ghostmask").iterdir() if path.is_file()}
    assert names == sorted(expected)


def test_the_wheel_holds_files_and_no_links(wheel: Path) -> None:
    modes = {info.filename: info.external_attr >> 16 for info in zipfile.ZipFile(wheel).infolist()}
    assert not [name for name, mode in modes.items() if stat.S_ISLNK(mode)]


def test_a_wheel_that_is_built_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = Path(sdist.removesuffix(".tar.gz"))
    (again,) = WheelBuilder(str(source)).build(directory=str(tmp_path), versions=["standard"])
    assert contents(Path(again)) == contents(wheel)


def test_the_installed_command_and_the_version_are_those_of_the_code(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert f"\nVersion: {ghostmask.__version__}\n" in archive.read(f"{info}/METADATA").decode()
    scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert re.findall(r"^ghostmask *= *(\S+)$", scripts, flags=re.M) == ["ghostmask.launcher.main:main"]


def test_tracked_files_are_small_sources_and_no_data(tracked: list[Path]) -> None:
    for path in tracked:
        assert path.suffix not in {".beton", ".safetensors", ".pt", ".pth", ".whl", ".npz", ".npy"}, path
        assert path.stat().st_size < 300_000, path
        if path.suffix == ".py":
            assert len(path.read_text().splitlines()) <= 400, f"{path}: find the second idea and move it out"


def test_tracked_files_name_no_machine_and_no_package_index(tracked: list[Path]) -> None:
    machine = re.compile(r"(?<![\w.~$}{)])/(work|root|home|Users|mnt)/\w")
    index = re.compile(r"pypi\.org|pythonhosted\.org|deb\.debian\.org|download\.pytorch\.org|index-url")
    for path in tracked:
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            assert not machine.search(line), f"{path}:{number} names a folder of one machine"
            assert not index.search(line), f"{path}:{number} names a package index"


def test_every_python_file_says_first_which_question_it_answers(tracked: list[Path]) -> None:
    for path in tracked:
        if path.suffix == ".py":
            assert path.read_text().startswith('"""'), path


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """What setup reads, in a folder without .venv, and `bin` beside it: a PATH with no Python, compiler or sudo."""
    for name in ("pyproject.toml", "constraints.txt", ".ci/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "id", "realpath", "sha256sum", "tr"):
        (tools / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def setup_output(checkout: Path, **environment: str) -> tuple[int, str]:
    """(exit code, everything printed) of the setup script with checkout/bin as its whole PATH."""
    result = subprocess.run(
        ["bash", ".ci/setup.sh"],
        cwd=checkout, env={"PATH": str(checkout / "bin"), **environment},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def test_setup_without_a_fitting_python_says_which_are_needed(bare_checkout: Path) -> None:
    old = bare_checkout / "bin/python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    code, output = setup_output(bare_checkout)
    assert code == 1
    assert "no Python 3.11 or 3.12 found" in output
    assert not (bare_checkout / ".venv").exists()


def test_setup_that_may_not_install_prints_the_command_and_stops(bare_checkout: Path) -> None:
    code, output = setup_output(bare_checkout, PYTHON=os.path.realpath(sys.executable))
    assert code == 1
    assert "apt-get install -y --no-install-recommends pkg-config g++ libturbojpeg0-dev libopencv-dev" in output
    assert not (bare_checkout / ".venv").exists()


def test_setup_asks_only_for_what_is_missing(bare_checkout: Path) -> None:
    for name in ("cc", "c++"):
        (bare_checkout / "bin" / name).symlink_to("/bin/true")
    _, output = setup_output(bare_checkout, PYTHON=os.path.realpath(sys.executable))
    assert "missing on this machine: pkg-config libturbojpeg0-dev libopencv-dev" in output
    assert "g++" not in output


def normal(name: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_setup_on_a_disk_that_is_too_small_says_so_before_it_installs(bare_checkout: Path, small_disk: Path) -> None:
    checkout = small_disk / "checkout"
    shutil.copytree(bare_checkout, checkout, symlinks=True, ignore=shutil.ignore_patterns("disk"))
    path = os.environ["PATH"]
    code, output = setup_output(checkout, PATH=path, PYTHON=os.path.realpath(sys.executable))
    assert code == 1
    assert f"needs 8 GB on the disk of {checkout}, where 0 GB are free" in output
    assert not (checkout / ".venv").exists()
