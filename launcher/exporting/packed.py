"""Format packed: only what is left of the weights, and where it lies, in one plain safetensors file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from ghostmask.engine.errors import bad_value
from ghostmask.launcher.export import MODEL_FILE, load_export
from ghostmask.launcher.exporting import card, load_packed, network_file
from ghostmask.launcher.exporting.exported import FIELD, Exported, Options, Written, write_readable

FILE = "model.packed.safetensors"
LARGEST_GAP = 255
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Parts = tuple[dict[str, NDArray[Any]], dict[str, Any]]


def write(exported: Exported, folder: Path, options: Options) -> Written:
    """The packed file, and load_packed.py, which reads it."""
    state = load_export(exported.folder / MODEL_FILE, FIELD)
    content, notes = pack(state, options.values, entropy=options.coding == "entropy")
    files = write_readable(exported, folder, FILE, content, load_packed)
    load = card.plain_load(exported.summary, network_file.FILE in files)
    load = load.replace(
        "from safetensors.torch import load_file\n", "import torch\nfrom load_packed import load_packed\n"
    )
    load = load.replace(
        f'load_file("{MODEL_FILE}")',
        f'{{name: torch.from_numpy(array) for name, array in load_packed("{FILE}").items()}}',
    )
    return Written(files, load, notes)


def pack(state: Mapping[str, Tensor], values: str, *, entropy: bool) -> tuple[bytes, list[str]]:
    """(a safetensors file, sentences on what costs what) of a state dict; `load_packed` is its inverse.

    values: of VALUES, the type in which float tensors of two and more dimensions are kept; those of one (batch norm,
    biases) and integers stay as they are, so that everything that is read back has the bits of the rounded weights.
    entropy: masks and values by Huffman's code where that is smaller. Where a tensor is 0 (not -0) it is left out, as
    1-bit mask or as gaps, whichever is smaller; in a tensor without enough zeros nothing is. Raises InputError of
    --values where a weight is too large for it.
    """
    parts: dict[str, NDArray[Any]] = {}
    about: dict[str, Any] = {}
    cost = {"values": 0, "masks": 0, "dense": 0, "rest": 0}
    for name, tensor in state.items():
        many = tensor.dim() >= 2 and tensor.dtype == torch.float32
        stored, facts = _packed(tensor, values, entropy, name) if many else (
            {"": tensor.numpy()}, {"values": "as_is", "mask": "none", "zlib": []}
        )  # fmt: skip
        parts |= {f"{name}{end}": array for end, array in stored.items()}
        about[name] = {"shape": list(tensor.shape), **facts}
        cost["masks"] += stored[".mask"].nbytes if ".mask" in stored else 0
        cost["rest" if not many else "values" if ".mask" in stored else "dense"] += stored[""].nbytes
    words = {
        "values": f"values ({values})", "masks": "masks", "dense": "weights that are kept whole",
        "rest": "batch norm and biases (as they were)",
    }  # fmt: skip
    text = ", ".join(f"{what} {cost[key] / 1e6:.2f} MB" for key, what in words.items())
    return save(parts, metadata={"packed": json.dumps(about)}), [f"Packed: {text}."]


def _packed(tensor: Tensor, values: str, entropy: bool, name: str) -> Parts:
    """One tensor's parts by the ends of their names, and how they are to be read: the smallest way there is."""
    flat = tensor.reshape(-1)
    whole = flat.numpy()
    kept = whole.view(np.uint32) != 0  # a kept -0.0 has a sign bit
    rounded = flat[torch.from_numpy(kept)].to(TYPES[values])
    if not bool(torch.isfinite(rounded).all()):
        raise bad_value("--values", values, f"{name} holds larger numbers than it has; use bf16 or float32")
    masks = {"bits": np.packbits(kept), "gaps": gaps_of(kept)}
    coded = {kind: _smaller(mask) if entropy else (mask, False) for kind, mask in masks.items()}
    kind = min(coded, key=lambda kind: coded[kind][0].nbytes)
    mask, mask_is_coded = coded[kind]
    dense, dense_is_coded = _values_of(flat.to(TYPES[values]), entropy)
    sparse, sparse_is_coded = _values_of(rounded, entropy)
    if dense.nbytes <= sparse.nbytes + mask.nbytes and bool((flat[torch.from_numpy(~kept)].signbit() == 0).all()):
        return {"": dense}, {"values": values, "mask": "none", "zlib": ["values"] if dense_is_coded else []}
    which = [what for what, coded in (("values", sparse_is_coded), ("mask", mask_is_coded)) if coded]
    return {"": sparse, ".mask": mask}, {"values": values, "mask": kind, "zlib": which}


def gaps_of(kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """For each True how many False lie before it since the last, a byte; 255 counts as 255 and goes on."""
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    more, rest = np.divmod(gaps, LARGEST_GAP)
    text = np.full(int(more.sum()) + len(gaps), LARGEST_GAP, np.uint8)
    text[np.cumsum(more + 1) - 1] = rest
    return text


def _values_of(values: Tensor, entropy: bool) -> tuple[NDArray[Any], bool]:
    array = values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
    if not entropy or not len(array):
        return array, False
    planes = np.ascontiguousarray(array.view(np.uint8).reshape(len(array), -1).T)
    coded, is_coded = _smaller(planes.reshape(-1))
    return (coded, True) if is_coded else (array, False)


def _smaller(data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], bool]:
    """The bytes by Huffman's code alone (zlib's), whose blocks have codes of their own; or as they are."""
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    coded = np.frombuffer(coder.compress(data.tobytes()) + coder.flush(), np.uint8)
    return (coded, True) if coded.nbytes < data.nbytes else (data, False)
