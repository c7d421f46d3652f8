"""What can be chosen: methods, models, datasets and shipped configs, each with a line from its own source."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from ghostmask import __version__
from ghostmask.data_pipelines.registry import DATASETS
from ghostmask.launcher.locate import shipped_configs
from ghostmask.masks.registry import METHODS
from ghostmask.models.names import OTHERS
from ghostmask.models.registry import MODELS


def methods() -> list[str]:
    """One line per mask method: its name and the first line of its module's docstring."""
    return _aligned((name, _module_doc(entry)) for name, entry in METHODS.items())


def models() -> list[str]:
    """One line per network: its name and the first line of its function's docstring; then what else is taken."""
    return _aligned([*((name, _function_doc(entry)) for name, entry in MODELS.items()), *OTHERS.items()])


def datasets() -> list[str]:
    """One line per dataset: its name and the first line of its function's docstring."""
    return _aligned((name, _function_doc(entry)) for name, entry in DATASETS.items())


def configs() -> list[str]:
    """One line per shipped config: its name and the first comment of its file."""
    return _aligned((name, first_comment(path)) for name, path in shipped_configs().items())


TABLES: dict[str, Callable[[], list[str]]] = {
    "methods": methods,
    "models": models,
    "datasets": datasets,
    "configs": configs,
}
"""What `ghostmask show NAME` prints."""


def versions() -> str:
    """The versions of ghostmask and of what a bug report needs, from the libraries' metadata: none is imported."""
    parts = [f"{name} {_version(name)}" for name in ("torch", "deepspeed", "ffcv")]
    return f"ghostmask {__version__} ({', '.join(parts)}, python {platform.python_version()})"


def first_comment(path: Path) -> str:
    """The first comment of a YAML file, "" where there is none."""
    with path.open(encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    table = list(rows)
    width = max(len(name) for name, _ in table)
    return [f"{name:{width}}  {text}".rstrip() for name, text in table]


@cache
def _source(module: str) -> ast.Module:
    """The parsed source of a module, without importing it: most of them import torch."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the registry names {module}, which does not exist", name=module)
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _module_doc(entry: str) -> str:
    return _first_line(ast.get_docstring(_source(entry.partition(":")[0])))


def _function_doc(entry: str) -> str:
    module, _, name = entry.partition(":")
    for node in _source(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return _first_line(ast.get_docstring(node))
    raise AttributeError(f"the registry names {entry}, which does not exist")


def _first_line(doc: str | None) -> str:
    return doc.splitlines()[0] if doc else ""
