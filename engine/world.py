"""This process among its peers: rank, size, device, and the collectives, which are identities at size 1."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore

from ghostmask.engine.errors import InputError, RunStopped, bad_value
from ghostmask.engine.launch import Launch, device_index, read_launch
from ghostmask.engine.pulse import SLOW_FACTOR, Pulse
from ghostmask.engine.ranks import join
from ghostmask.engine.waiting import Waiting
from ghostmask.engine.watch import Watch


@dataclass(frozen=True)
class World:
    """One process of a run. Passed in, never a global.

    rank: this process's number in [0, size); device: where its tensors live; group: the group of all ranks (gloo on the
    CPU, NCCL with gloo beside it for CPU tensors on GPUs); pulse: how far this rank is, for the watch over ranks that
    hang.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    pulse: Pulse = field(default_factory=Pulse, kw_only=True, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Collective: reduce `tensor` in place over all ranks and return it."""
        self.pulse.meet()
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Collective: every rank's tensor of equal shape, stacked: (size, *shape)."""
        self.pulse.meet()
        if self.size == 1:
            return tensor.unsqueeze(0)
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(pieces, tensor.contiguous(), group=self.group)
        return torch.stack(pieces)

    def reduce_scatter(self, flat: Tensor) -> Tensor:
        """Collective: this rank's slice, (n / size,), of the sum over all ranks of `flat`, (n,); size divides n."""
        self.pulse.meet()
        if self.size == 1:
            return flat
        own = flat.new_empty(flat.numel() // self.size)
        dist.reduce_scatter_tensor(own, flat, group=self.group)
        return own

    def all_gather_object(self, value: Any) -> list[Any]:
        """Collective: every rank's picklable value, in rank order."""
        self.pulse.meet()
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Collective: rank 0's picklable value, on every rank."""
        self.pulse.meet()
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


@contextmanager
def connect(device: str = "auto", timeout_minutes: float = 10.0, dumps: Path | None = None) -> Iterator[World]:
    """Collective: the ranks that were started together (see engine.launch) form a process group, and leave it later.

    device: "auto" (CUDA where there is one), "cpu" or "cuda"; timeout_minutes, dumps: as in engine.watch, 0 = no watch.
    Raises InputError where CUDA is asked for and absent, PeerFailed where another rank failed before it came here.
    After an exception that the ranks do not share the group is left as it is: the peers are elsewhere.
    """
    launch = read_launch()
    place = _device(device, launch.local_rank)
    _tell_deepspeed(launch, place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    pulse = Pulse()
    world = World(launch.rank, launch.size, place, pulse=pulse)
    waiting = Waiting(pulse) if world.is_main else None
    if waiting is not None:
        waiting.start()
    try:
        with _alone(backend) if launch.size == 1 else _joined(launch, backend, place, pulse, timeout_minutes, dumps):
            yield replace(world, group=dist.group.WORLD)
    finally:
        if waiting is not None:
            waiting.stop()


@contextmanager
def _alone(backend: str) -> Iterator[None]:
    """A process group of one."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, store=FileStore(os.path.join(folder, "store"), 1), rank=0, world_size=1)
        try:
            yield
        except (InputError, RunStopped):
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@contextmanager
def _joined(
    launch: Launch, backend: str, place: torch.device, pulse: Pulse, minutes: float, dumps: Path | None
) -> Iterator[None]:  # fmt: skip
    """A process group of all ranks, each of them watched."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    _allow_sockets()
    longest_s = 60 * minutes * SLOW_FACTOR if minutes else 30 * 86400.0
    ranks = join(launch)
    if place.type == "cuda":
        claim_gpu(ranks.store, str(torch.cuda.get_device_properties(place).uuid), launch)
    ranks.arrive(longest_s)
    dist.init_process_group(
        backend, store=PrefixStore("group", ranks.store), rank=launch.rank, world_size=launch.size,
        timeout=timedelta(seconds=longest_s + 60),  # after the watch, which knows who is missing
    )  # fmt: skip
    watch = Watch(ranks, pulse, minutes, dumps) if minutes else None
    if watch is not None:
        watch.start()
    try:
        yield
    finally:
        if watch is not None:
            watch.stop()
    dist.destroy_process_group()


def claim_gpu(store: Any, uuid: str, launch: Launch) -> None:
    """Raise InputError if a rank before this one has taken the GPU `uuid`: NCCL would end with a riddle."""
    if store.add(f"gpu/{uuid}", 1) > 1:
        fix = (
            "ranks on this machine share a GPU; start one per GPU (--ranks, --nproc-per-node), or give train.device=cpu"
        )
        raise bad_value("ranks", launch.local_size, fix)


def _allow_sockets() -> None:
    """Let this process open as many files as it may. gloo connects each rank with every other, once per group, and each
    is connected twice with the rank that keeps the store: the usual limit, 1,024, is reached there at 256 ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise bad_value("train.device", name, "no CUDA device is visible here; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = torch.device("cuda", device_index(local_rank, torch.cuda.device_count()))
    torch.cuda.set_device(place)
    return place


def _tell_deepspeed(launch: Launch, place: torch.device) -> None:
    """DeepSpeed insists on these variables, and takes LOCAL_RANK for the number of the GPU."""
    local = place.index if place.type == "cuda" else launch.local_rank
    os.environ["LOCAL_RANK"] = str(local)
    if launch.size > 1:
        os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.size), LOCAL_WORLD_SIZE=str(launch.local_size))
        os.environ.update(MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port))
