"""Is what is tracked, built and installed the project and nothing else?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

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


def test_the_generic_package_names_belong_to_this_project_only() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in PACKAGES:
        assert set(owners.get(name, [])) <= {"ghostmask"}, f"{name} is also installed by {owners[name]}"
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin == str(ROOT / name / "__init__.py")


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


def test_the_wheel_holds_the_packages_and_the_run_files_and_nothing_else(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for package in PACKAGES:
        for source in [*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.yaml")]:
            assert source.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if "test" in Path(name).name]


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
