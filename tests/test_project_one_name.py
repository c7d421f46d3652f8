"""Is the code there under one name, however it is installed and whatever the user's own modules are called?"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from mypy.main import process_options

import ghostmask

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "configs", "data_pipelines", "engine", "launcher", "masks", "models")
HEAVY = {"torch", "torchvision", "deepspeed", "ffcv", "numba", "numpy", "yaml"}

THEIRS = """
import sys
import engine, launcher, masks.theirs, models
import ghostmask.benchmarks.row, ghostmask.data_pipelines.config, ghostmask.engine.position, ghostmask.launcher.locate
import ghostmask.masks.registry, ghostmask.models.config
assert engine.OWNER == launcher.OWNER == masks.theirs.OWNER == models.OWNER == "user"
print(ghostmask.__path__[0])
print(*sorted(name for name in sys.modules if name.split(".")[0] in PACKAGES))
"""

POOL = """
import multiprocessing, sys
import engine, models
from ghostmask.engine.position import Duration
from ghostmask.models.config import ModelConfig

def there_and_back(items):
    return engine.OWNER, [type(item).__module__ for item in items], items

if __name__ == "__main__":
    sent = [ModelConfig("conv4"), Duration.parse("90ep", "x")]
    for how in ("spawn", "forkserver"):
        with multiprocessing.get_context(how).Pool(1) as pool:
            owner, modules, items = pool.apply(there_and_back, (sent,))
        assert items == sent
        print(how, owner, *modules)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder whose modules are called as our folders are: files, a package, and a package without __init__."""
    folder = tmp_path / "elsewhere"
    for name in ("engine.py", "launcher.py", "models/__init__.py", "masks/theirs.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("OWNER = 'user'\n")
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel of this checkout was installed into by pip."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    target = folder / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        wheel,
    ]
    subprocess.run(command, check=True, timeout=120)
    return target


@pytest.fixture(scope="session")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an editable installation of this checkout puts on the import path."""
    folder = tmp_path_factory.mktemp("editable")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["editable"])
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if ".dist-info/" not in name]
    return Path(archive.read(name).decode().strip())


def run(command: list[str], folder: Path, *path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, with `path` before everything that is installed; it must succeed."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def python(*arguments: str, bare: bool = False) -> list[str]:
    """The interpreter of the tests; bare: it does not look into .pth files, that of its own editable installation."""
    return [sys.executable, *(["-S"] if bare else []), *arguments]


def script(name: str) -> str:
    """A command that is installed beside the interpreter."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def test_every_command_works_in_a_folder_with_modules_of_the_same_names(elsewhere: Path, editable: Path) -> None:
    lines = run([script("ghostmask"), "show", "methods"], elsewhere, editable).stdout
    assert lines.startswith("dense")
    assert run(python("-m", "ghostmask", "show", "methods"), elsewhere, editable).stdout == lines


def test_ranks_of_torchrun_start_in_a_folder_with_modules_of_the_same_names(elsewhere: Path, editable: Path) -> None:
    command = [script("torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "ghostmask"]
    assert run([*command, "show", "models"], elsewhere, editable).stdout.count("digits_resnet ") == 2


def test_the_engine_is_imported_beside_a_users_engine(elsewhere: Path, editable: Path) -> None:
    code = "import engine, ghostmask.engine.trainer as ours; print(engine.OWNER, ours.Trainer.__module__)"
    done = run(python("-c", code), elsewhere, editable, DS_ACCELERATOR="cpu")
    assert done.stdout == "user ghostmask.engine.trainer\n"


def test_spawned_processes_unpickle_our_classes_beside_the_users_modules(elsewhere: Path, editable: Path) -> None:
    (elsewhere / "main.py").write_text(POOL)
    expected = "user ghostmask.models.config ghostmask.engine.position"
    assert run(python("main.py"), elsewhere, editable).stdout == f"spawn {expected}\nforkserver {expected}\n"


@pytest.mark.parametrize("how", ["editable", "installed"])
def test_an_installation_takes_no_name_but_its_own(how: str, elsewhere: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(how)
    assert {path.name for path in folder.iterdir()} - {"bin"} <= {
        "ghostmask",
        f"ghostmask-{ghostmask.__version__}.dist-info",
    }
    libraries = [Path(path) for path in site.getsitepackages()]
    code = f"PACKAGES = {PACKAGES!r}\n{THEIRS}"
    where, names = run(python("-c", code, bare=True), elsewhere, folder, *libraries).stdout.splitlines()
    assert where == str(folder / "ghostmask")
    assert names == "engine launcher masks masks.theirs models"
    done = run(python("-m", "ghostmask", "show", "configs", bare=True), elsewhere, folder, *libraries)
    assert done.stdout.startswith("cifar100_methods")


@pytest.mark.parametrize("how", ["links", "followed", "git archive"])
def test_a_copy_of_the_checkout_runs_its_own_code(how: str, elsewhere: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    if how == "git archive":
        archive = tmp_path / "archive.tar"
        command = ["git", "archive", "--output", str(archive), "HEAD"]
        if subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode:
            pytest.skip("not a git checkout, or nothing is committed")
        shutil.unpack_archive(archive, copy, filter="data")
    else:
        left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "data", "runs")
        shutil.copytree(ROOT, copy, symlinks=how == "links", ignore=left_out)
    code = "import ghostmask.engine.position, os; print(os.path.realpath(ghostmask.engine.position.__file__))"
    file = Path(run(python("-c", code), elsewhere, copy).stdout.strip())
    assert file.is_relative_to(copy.resolve())
    for module in ("ghostmask", "launcher"):
        (elsewhere / "launcher.py").unlink(missing_ok=True)  # -m launcher is theirs where they have one
        assert run(python("-m", module, "show", "methods"), elsewhere, copy).stdout.startswith("dense")


def test_a_package_under_its_short_name_says_its_right_one() -> None:
    code = "import importlib, sys\ntry: importlib.import_module(sys.argv[1])\nexcept ImportError as error: print(error)"
    for package in PACKAGES:
        for module in (package, f"{package}.config"):
            said = run(python("-c", code, module), ROOT, ROOT).stdout
            assert said.startswith(f"this package is imported as ghostmask.{package}, not as {package}: ")


def test_python_m_does_not_open_the_launcher_to_imports_under_its_short_name(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import launcher\n")
    (tmp_path / "theirs" / "__main__.py").write_text("")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = python("-m", "theirs")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "this package is imported as ghostmask.launcher, not as launcher" in done.stderr


def test_type_checkers_see_each_file_once_under_the_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sources, _ = process_options([])
    assert {source.module.split(".")[0] for source in sources} == {"ghostmask"}
    files = [os.path.realpath(str(source.path)) for source in sources]
    assert len(set(files)) == len(files)
    folders = ("ghostmask", *PACKAGES)
    assert set(files) == {str(path) for folder in folders for path in (ROOT / folder).rglob("*.py")}


def test_importing_ghostmask_is_light() -> None:
    code = "import sys, ghostmask; print(*sys.modules)"
    modules = set(run(python("-c", code), ROOT).stdout.split())
    assert not {name for name in modules if name.startswith("ghostmask.")}
    assert not modules & HEAVY


def test_a_name_of_the_library_is_imported_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ghostmask.engine.position import Duration

    monkeypatch.setitem(ghostmask._LIBRARY, "Stretch", "ghostmask.engine.position:Duration")
    assert ghostmask.Stretch is Duration
    assert "Stretch" in dir(ghostmask)
    monkeypatch.setattr(ghostmask, "__all__", ["Stretch"])
    names: dict[str, object] = {}
    exec("from ghostmask import *", names)
    assert names["Stretch"] is Duration


def test_a_name_that_the_library_does_not_have_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ghostmask._LIBRARY, "Stretch", "ghostmask.engine.position:Duration")
    with pytest.raises(AttributeError, match=r"^module 'ghostmask' has no attribute 'Strech': it offers .*Stretch"):
        _ = ghostmask.Strech
    with pytest.raises(AttributeError, match=r"; masks is a package of it: import ghostmask\.masks$"):
        ghostmask.__getattr__("masks")
    with pytest.raises(ImportError, match="cannot import name 'Strech'"):
        exec("from ghostmask import Strech")
