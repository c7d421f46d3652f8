"""How is a packed file read? Needs numpy and safetensors only; this file lies beside the packed one.

load_packed("model.packed.safetensors") -> {name: float32 (or integer) array}; for torch:
net.load_state_dict({name: torch.from_numpy(array) for name, array in load_packed(path).items()})
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
from safetensors import safe_open


def load_packed(path: str) -> dict[str, Any]:
    """Name -> array in its own shape, zeros filled in; weights are float32, rounded as the file keeps them.

    The file's metadata has, under "packed", JSON: name -> {shape, values: float32 | bf16 | fp16 | as_is, mask: none |
    bits | gaps, zlib: which of the two parts are compressed}. A tensor's parts are NAME (values) and NAME.mask.
    """
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["packed"])
        return {name: _tensor(file, name, facts) for name, facts in about.items()}


def _tensor(file: Any, name: str, facts: dict[str, Any]) -> Any:
    values = _values(file.get_tensor(name), facts["values"], "values" in facts["zlib"])
    if facts["mask"] == "none":
        return values.reshape(facts["shape"])
    mask = file.get_tensor(f"{name}.mask")
    if "mask" in facts["zlib"]:
        mask = np.frombuffer(zlib.decompress(mask.tobytes()), np.uint8)
    whole = np.zeros(int(np.prod(facts["shape"])), values.dtype)
    if facts["mask"] == "bits":
        whole[np.unpackbits(mask, count=len(whole)).astype(bool)] = values
    else:
        whole[_places(mask)] = values
    return whole.reshape(facts["shape"])


def _places(gaps: Any) -> Any:
    """Gaps: for each kept weight how many zeros lie before it, in bytes; 255 means 255 and the next byte adds to it."""
    ends = np.flatnonzero(gaps != 255)
    return np.cumsum(gaps.astype(np.int64))[ends] + np.arange(len(ends))


def _values(stored: Any, kind: str, compressed: bool) -> Any:
    """Compressed: the low bytes of all values, then the next ones: exponents repeat, mantissas do not."""
    if compressed:
        size = 4 if kind == "float32" else 2
        planes = np.frombuffer(zlib.decompress(stored.tobytes()), np.uint8).reshape(size, -1)
        stored = np.ascontiguousarray(planes.T).view({"float32": "<f4", "bf16": "<u2", "fp16": "<f2"}[kind])[:, 0]
    if kind == "bf16":  # numpy has no bfloat16: the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32) if kind == "fp16" else np.array(stored)
