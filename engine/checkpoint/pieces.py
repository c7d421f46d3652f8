"""How does a rank save and load only the part of a flattened tensor that it owns: Piece, and how DCP sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Piece:
    """This rank's elements [start, start + numel) of a flattened tensor of `full_numel` elements.

    tensor: 1-D view of them, on any device; may hold 0 elements. Other ranks hold the rest; ranks may also hold equal
    pieces. The caller promises nothing else: that every element has an owner is checked when the tensor is saved.
    Raises ValueError where the piece does not fit.
    """

    full_numel: int
    start: int
    tensor: Tensor

    def __post_init__(self) -> None:
        if self.tensor.dim() != 1:
            raise ValueError(f"a piece is one-dimensional, this tensor has shape {tuple(self.tensor.shape)}")
        if not 0 <= self.start <= self.start + self.tensor.numel() <= self.full_numel:
            end = self.start + self.tensor.numel()
            raise ValueError(f"elements {self.start}..{end} lie outside a tensor of {self.full_numel} elements")


class FragmentTensor(Tensor):
    """A piece as DCP sees it: a tensor of shape (full_numel,) whose one chunk is the piece.

    It owns no memory and computes nothing; DCP writes from and reads into the piece's own tensor.
    """

    piece: Piece

    @staticmethod
    def __new__(cls, piece: Piece) -> FragmentTensor:
        make: Any = Tensor._make_wrapper_subclass
        local = piece.tensor
        self: FragmentTensor = make(cls, (piece.full_numel,), dtype=local.dtype, device=local.device)
        self.piece = piece
        return self

    def __create_write_items__(self, name: str, _: Tensor) -> list[WriteItem]:
        """DCP: what this rank writes. An empty piece of a tensor with elements writes nothing."""
        local = self.piece.tensor
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                # Not create_from_tensor(self): asking a wrapper whether it is pinned would dispatch an operator.
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=local.dtype), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """DCP: which elements this rank reads."""
        numel = self.piece.tensor.numel()
        if numel == 0 and self.piece.full_numel > 0:
            return []
        return [ChunkStorageMetadata(offsets=torch.Size([self.piece.start]), sizes=torch.Size([numel]))]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """DCP: the memory of the chunk that starts at index.offset."""
        if index.offset != torch.Size([self.piece.start]):
            raise ValueError(f"{index.fqn}: this rank's piece starts at {self.piece.start}, not at {index.offset}")
        return self.piece.tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Never computes: whoever calls an operator on a fragment mistook it for the whole tensor."""
        raise TypeError(f"{func} on a fragment of a checkpoint")
