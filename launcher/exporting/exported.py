"""What is every format made of: an export, read again; and what does a format say of its own files?"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ghostmask.engine.atomic import read_small
from ghostmask.engine.errors import InputError
from ghostmask.launcher.export import MODEL_FILE, SUMMARY_FILE, load_export
from ghostmask.launcher.exporting import network_file
from ghostmask.masks.mask_file import fill
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

FIELD = "RUN"
OTHERWISE = "export it as safetensors or packed, which take any network"


@dataclass(frozen=True)
class Exported:
    """A network as it was exported. net: on the CPU, in eval mode, pruned weights at 0; summary: of summary.json;
    image_shape: (channels, height, width) of its evaluation images; folder: where it was read."""

    net: nn.Module
    summary: dict[str, Any]
    image_shape: tuple[int, int, int]
    folder: Path


@dataclass(frozen=True)
class Options:
    """Of format packed. values: in which type weights are kept; coding: whether the file is entropy-coded."""

    values: str = "float32"
    coding: str = "plain"


@dataclass(frozen=True)
class Written:
    """files: names in the folder, the network's own file first; load: lines of Python that define `net`, a function
    of a batch of images, in that folder and without ghostmask; notes: sentences on what was done; loads: other lines
    that do, by what they are called."""

    files: list[str]
    load: str
    notes: list[str]
    loads: dict[str, str] = field(default_factory=dict)


def write_readable(exported: Exported, folder: Path, name: str, content: bytes, reader: ModuleType) -> list[str]:
    """Write a network's file `name` and what reads it: the module `reader`, and the file that builds the network, where
    there is one. Returns their names, the network's own first."""
    assert reader.__file__ is not None
    (folder / name).write_bytes(content)
    beside = [path for path in (Path(reader.__file__), exported.folder / network_file.FILE) if path.is_file()]
    for path in beside:
        (folder / path.name).write_bytes(path.read_bytes())
    return [name, *(path.name for path in beside)]


def read_exported(folder: Path) -> Exported:
    """The network of the model.safetensors and summary.json in `folder`. Raises InputError where they are not whole,
    or are of a version that said too little of the network."""
    again = f"write it again: ghostmask {'export'} RUN"
    try:
        summary = json.loads(read_small(folder / SUMMARY_FILE))
        about, model = summary["network"], ModelConfig(**summary["config"]["model"])
        shape = tuple(about["image_shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"there is no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{FIELD} = {str(folder)!r}: its {SUMMARY_FILE} cannot be used ({reason}); {again}") from None
    _check_digest(folder, summary)
    net = build_model(model, about["num_classes"], shape, 0)
    fill(net, load_export(folder / MODEL_FILE, FIELD), FIELD, str(folder / MODEL_FILE))
    return Exported(net.eval(), summary, shape, folder)


def _check_digest(folder: Path, summary: dict[str, Any]) -> None:
    """Raise InputError where the summary is of other weights: of an export that was killed between its files."""
    about = summary.get("file")
    if not isinstance(about, dict) or not (folder / MODEL_FILE).is_file():
        return  # an older version's, or for load_export to say
    with open(folder / MODEL_FILE, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != about.get("sha256"):
        why = f"its {SUMMARY_FILE} is of another {MODEL_FILE} than lies beside it"
        raise InputError(f"{FIELD} = {str(folder)!r}: {why}; write both again: ghostmask {'export'} RUN")


def require_library(format_name: str, module: str, extra: str = "export") -> Any:
    """The module, imported. Raises InputError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = f"pip install 'ghostmask[{extra}]' (in a checkout: pip install -e '.[{extra}]')"
        raise InputError(f"--format = {format_name!r}: needs {module} ({error}); install it: {fix}") from None
