"""This process among its peers: rank, size, device, and the collectives, which are identities at size 1."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from ghostmask.engine.errors import InputError, RunStopped, bad_value


@dataclass(frozen=True)
class World:
    """One process of a run. Passed in, never a global.

    rank: this process's number in [0, size); device: where its tensors live;
    group: the group of all ranks (gloo on the CPU, NCCL with gloo beside it for CPU tensors on GPUs).
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Collective: reduce `tensor` in place over all ranks and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Collective: every rank's tensor of equal shape, stacked: (size, *shape)."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(pieces, tensor.contiguous(), group=self.group)
        return torch.stack(pieces)

    def reduce_scatter(self, flat: Tensor) -> Tensor:
        """Collective: this rank's slice, (n / size,), of the sum over all ranks of `flat`, (n,); size divides n."""
        if self.size == 1:
            return flat
        own = flat.new_empty(flat.numel() // self.size)
        dist.reduce_scatter_tensor(own, flat, group=self.group)
        return own

    def all_gather_object(self, value: Any) -> list[Any]:
        """Collective: every rank's picklable value, in rank order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Collective: rank 0's picklable value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Collective: returns when every rank has arrived."""
        self.all_gather_object(None)


def single(device: torch.device | None = None) -> World:
    """A world of one process (on the CPU), without a process group: its reductions are identities."""
    return World(rank=0, size=1, device=device or torch.device("cpu"))


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, size, local_rank) as torchrun and Slurm launchers set them; (0, 1, 0) without a launcher."""
    env = os.environ
    return int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1")), int(env.get("LOCAL_RANK", "0"))


@contextmanager
def connect(device: str = "auto", timeout_s: float = 1800.0) -> Iterator[World]:
    """Collective: join the process group that torchrun (or nobody: one rank) set up, and leave it at the end.

    device: "auto" (CUDA where there is one), "cpu" or "cuda". Raises InputError where CUDA is asked for and absent.
    """
    rank, size, local_rank = rank_from_environment()
    place = _device(device, local_rank)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it, without a launcher too
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
        else:
            store = FileStore(os.path.join(folder, "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield World(rank, size, place, dist.group.WORLD)
        except (InputError, RunStopped):
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()  # not after any other exception: the peers are elsewhere and could keep us waiting


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise bad_value("train.device", name, "no CUDA device is visible here; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place
