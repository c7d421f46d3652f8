"""Where does each tensor of a checkpoint lie: DCP's metadata as JSON, because reading a pickle can execute code.

{"tensors": {"prunable.weight/conv1.weight": {"dtype": "float32", "size": [432], "chunks": [
    {"offset": [0], "size": [216], "file": "__0_0.distcp", "start": 0, "bytes": 1234}, ...]}}}
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX = "index.json"


def to_json(metadata: Metadata) -> str:
    """The text of a checkpoint of tensors, whose metadata has its storage_data."""
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    tensors = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # CheckedSave refuses all else
        chunks = [_chunk(chunk, places[name, tuple(chunk.offsets)]) for chunk in tensor.chunks]
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(tensor.size), "chunks": chunks}
    return json.dumps({"tensors": tensors})


def from_json(text: str | bytes) -> Metadata:
    """The metadata of `to_json`. Raises ValueError for any other text."""
    try:
        tensors = json.loads(text)["tensors"]
        described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places: dict[MetadataIndex, StorageInfo] = {}
        for name, tensor in tensors.items():
            described[name] = known = _tensor(tensor)
            for chunk, found in zip(known.chunks, tensor["chunks"], strict=True):
                if "/" in found["file"] or found["file"].startswith("."):
                    raise ValueError(f"{name} lies in {found['file']!r}")
                info = StorageInfo(str(found["file"]), int(found["start"]), int(found["bytes"]))
                places[MetadataIndex(name, chunk.offsets)] = info
        return Metadata(described, storage_data=places)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is no index of a checkpoint ({type(error).__name__}: {error})") from None


def _chunk(chunk: ChunkStorageMetadata, info: StorageInfo) -> dict[str, Any]:
    place = {"file": info.relative_path, "start": info.offset, "bytes": info.length}
    return {"offset": list(chunk.offsets), "size": list(chunk.sizes), **place}


def _tensor(values: dict[str, Any]) -> TensorStorageMetadata:
    dtype = getattr(torch, values["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{values['dtype']!r} is no type of numbers")
    chunks = [ChunkStorageMetadata(torch.Size(c["offset"]), torch.Size(c["size"])) for c in values["chunks"]]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(values["size"]), chunks)
