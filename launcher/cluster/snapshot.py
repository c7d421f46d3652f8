"""The code that a job runs: copied when it is submitted, so that what is edited later does not change it."""

from __future__ import annotations

import importlib.util
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from ghostmask.engine.errors import InputError


def take_snapshot(folder: Path, models: Iterable[str]) -> None:
    """Copy ghostmask, and the modules of models of the user's own ("package.module:function"), into `folder`, in whose
    place they then stand as a whole. Raises InputError where it cannot be written."""
    new = folder.with_name(f".{folder.name}-new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        package = Path(sys.modules[__name__.partition(".")[0]].__file__ or "").parent
        shutil.copytree(package, new / package.name, ignore=_left_out)
        for model in models:
            if ":" in model:
                _copy_module(model.partition(":")[0].partition(".")[0], new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except (OSError, shutil.Error) as error:
        raise InputError(f"the code cannot be copied to {folder} ({error}); free the disk") from None


def _copy_module(name: str, to: Path) -> None:
    """The module or package `name`, unless it is an installed one, which stays where it is."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    places = [Path(spec.origin).parent] if spec.origin and not spec.submodule_search_locations else []
    places += [Path(place) for place in spec.submodule_search_locations or ()]
    installed = [Path(path) for path in (*site.getsitepackages(), sysconfig.get_paths()["stdlib"])]
    if any(place.is_relative_to(path) for place in places for path in installed):
        return
    if spec.submodule_search_locations:
        for place in places:
            shutil.copytree(place, to / name, ignore=_left_out, dirs_exist_ok=True)
    elif spec.origin:
        shutil.copy2(spec.origin, to)


def _left_out(_: str, names: list[str]) -> set[str]:
    """Compiled Python, whose tracebacks would name the old place; numba's compiled kernels stay: they fit."""
    return {name for name in names if name.endswith(".pyc") or name.startswith(".")}
