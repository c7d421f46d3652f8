"""Reads the weights of a network from a file, whoever wrote it: safetensors or torch.save, whatever it is called."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ghostmask.engine.atomic import require_file
from ghostmask.engine.errors import bad_value

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
"""Under which name others keep the weights in what they save."""
PREFIXES = ("module", "_orig_mod")
"""What DistributedDataParallel, AveragedModel and torch.compile put in front of every name."""
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and checkpointing of activations put into names, wherever a module is wrapped."""
COUNTER = "n_averaged"
"""What AveragedModel (EMA, SWA) counts in, beside the network's own names."""


def read_state_dict(path: Path, field: str, known: Collection[str] | None = None) -> dict[str, Tensor]:
    """Name -> CPU tensor of a safetensors file, or of a torch.save file with a state dict or {"state_dict": ...} in it.

    Its content decides which of them it is, not its suffix. Also under the other WRAPPERS; what wrappers of modules put
    into names is taken out and, where the network's names are `known`, also any other prefix that all names share.
    Executes no code of the file (weights_only). Raises InputError of `field` for any other file, for a broken one, and
    for a tensor without values (on the meta device).
    """
    _require_file(path, field)
    try:
        content = load_file(path) if _is_safetensors(path) else _unpickle(path)
    except pickle.UnpicklingError:  # torch's own text advises to execute what the file holds
        fix = "cannot be read (it holds more than tensors, or is not whole); save net.state_dict() alone"
        raise bad_value(field, str(path), fix) from None
    except Exception as error:  # what a damaged pickle makes of itself can raise anything
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise bad_value(field, str(path), f"cannot be read ({reason}); is the file whole?") from None
    for _ in WRAPPERS:
        if isinstance(content, Mapping):
            content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise bad_value(field, str(path), 'holds no state dict; save net.state_dict() or {"state_dict": ...}')
    named = {str(name): tensor for name, tensor in content.items()}
    for name, tensor in named.items():
        if tensor.is_meta or tensor.is_quantized or tensor.is_complex():
            what = "no values (meta)" if tensor.is_meta else "quantized" if tensor.is_quantized else "complex numbers"
            raise bad_value(field, str(path), f"{name} holds {what}; save a network of ordinary tensors")
    return plain_names(named, known)


def plain_names(named: Mapping[str, Tensor], known: Collection[str] | None = None) -> dict[str, Tensor]:
    """`named` under the names of the network itself, as far as `known` tells them: see read_state_dict."""
    names = set(known or ())
    if COUNTER not in names:
        named = {name: tensor for name, tensor in named.items() if name != COUNTER}
    named = _renamed(
        named,
        lambda name: name if name in names else ".".join(part for part in name.split(".") if part not in INSIDE),
    )
    shorter = named
    while not _some_known(shorter, names):
        first = {name.partition(".")[0] for name in shorter}
        if len(first) != 1 or not all("." in name for name in shorter):
            break
        shorter = _renamed(shorter, lambda name: name.partition(".")[2])
        if first <= set(PREFIXES):
            named = shorter
    return dict(shorter if _some_known(shorter, names) else named)


def values_of(tensor: Tensor, name: str, path: str, field: str) -> Tensor:
    """A dense float64 tensor of the same shape. Call it once the shape is known to be right: a few bytes of a file can
    claim any. Raises InputError of `field` where it holds nan or an infinite value."""
    values = (tensor.to_dense() if tensor.layout != torch.strided else tensor).to(torch.float64)
    if not bool(torch.isfinite(values).all()):
        what = "nan" if bool(torch.isnan(values).any()) else "infinite values"
        raise bad_value(field, path, f"{name} holds {what}; the file is damaged, or what wrote it had diverged")
    return values


def _require_file(path: Path, field: str) -> None:
    try:
        require_file(path)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        raise bad_value(field, str(path), f"{reason}; give a file with a state dict") from None
    if path.stat().st_size == 0:
        raise bad_value(field, str(path), "is empty; give a file with a state dict")


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of length, then JSON. In torch.save's archives and pickles these bytes are a number beyond any file's
    size; a length may begin as they do ("PK", 0x80)."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= path.stat().st_size


def _unpickle(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        # torch.save compresses nothing.
        if size > 2 * path.stat().st_size + 2**20:
            raise ValueError(f"an archive of {path.stat().st_size} bytes that unpacks to {size}")
    # torchvision's reference scripts save their arguments too; making a Namespace executes nothing.
    with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A sparse tensor whose indices lie outside of it would be read beyond its memory.
        checked = torch.sparse.check_sparse_tensor_invariants(True)  # type: ignore[no-untyped-call]
        with checked, open(path, "rb") as file:  # opened here: torch would go by the file's suffix
            return torch.load(file, map_location="cpu", weights_only=True)


def _renamed(named: Mapping[str, Tensor], rule: Callable[[str], str]) -> dict[str, Tensor]:
    return {rule(name): tensor for name, tensor in named.items()}


def _some_known(named: Mapping[str, Tensor], known: Collection[str]) -> bool:
    """Whether a name is one of the network's, or what a mask of one may be called."""
    bare = {name.removesuffix("_mask").removesuffix("_orig") for name in named}
    return any(name in known or f"{name}.weight" in known for name in bare)
