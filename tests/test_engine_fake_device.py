"""Does a step on a GPU mix devices, use wrong types, or wait for the device? Fake CUDA tensors, 8 fake ranks, no GPU.

Under FakeTensorMode nothing is computed, but devices and types are followed, and reading a value on the host
(`.item()`, `float(tensor)`, `nonzero`) raises. Autograd's engine asks for a driver there, so the gradients of the
network are put in by hand; everything that follows them is the system's own: buckets, exchange, chain rule, noise
groups, norm, update rules, projection, the next parameters, evaluation's and a checkpoint's views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import Library

from ghostmask.benchmarks.fake_ranks import on_fake_ranks
from ghostmask.engine import compiled
from ghostmask.engine.sharding.optimizer import Sampling, ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reducer import BucketReducer
from ghostmask.engine.sharding.reparametrization import Plain
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Layout, Run, Slice
from ghostmask.engine.world import World
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.relaxed import RelaxedMask, Search
from ghostmask.masks.relaxed_channels import RelaxedChannels
from ghostmask.masks.relaxed_kernels import RelaxedKernels
from ghostmask.masks.units.blocks import Kernels
from ghostmask.masks.units.channels import Channels
from ghostmask.masks.units.coupling import coupling

CUDA = torch.device("cuda", 0)


class FakeZero:
    """A placement like ZeRO's, over whole fake parameters: buckets are exchanged, parameters gathered."""

    def __init__(self, groups: Sequence[ParameterGroup], world: World) -> None:
        self.groups, self.world = groups, world
        self.slices = [Slice(Layout(g.shapes, world.size, align=2), world) for g in groups]
        self.reducer = BucketReducer(world, range(world.size), several=False)
        self.parts = []
        for group, part in zip(groups, self.slices, strict=True):
            (bucket,) = part.layout.buckets
            kind = torch.bfloat16 if group.bf16 else torch.float32
            self.reducer.add_bucket(part.layout.numels, bucket.share, kind)
            self.parts.append(torch.empty(bucket.share, dtype=kind, device=CUDA))
        self.reducer.set_leaving(range(len(groups)))

    def initial(self, group: int) -> Tensor:
        return torch.randn(self.slices[group].numel, device=CUDA)

    def outputs(self, group: int) -> list[tuple[Run, Tensor]]:
        return [(run, self.parts[group][: run.numel]) for run in self.slices[group].runs]

    def gradient(self, group: int) -> Tensor:
        return self.reducer.result(group)[: self.slices[group].numel].div_(self.world.size)

    def publish(self) -> None:
        for part in self.parts:
            whole = torch.empty(part.numel() * self.world.size, dtype=part.dtype, device=CUDA)
            dist.all_gather_into_tensor(whole, part, group=self.world.group)


def with_fused_kernels(library: Library) -> None:
    """torch has no fake form of its fused optimizers: all tensors on one device, as the real ones want it."""

    def check(*lists: Any, **settings: Any) -> None:
        tensors = [t for value in lists if isinstance(value, list | tuple) for t in value]
        tensors += [settings[name] for name in ("grad_scale", "found_inf")]
        assert {getattr(t, "fake_device", t.device) for t in tensors} == {CUDA}, "an update rule mixes devices"
        assert {t.dtype for t in tensors} == {torch.float32}, "an update rule is given other types than float32"

    for name in ("_fused_sgd_", "_fused_adam_"):
        library.impl(name, check, "Meta")


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10))


def units_of_network(method: str) -> Any:
    """What the method prunes as one; made before tensors are fake."""
    names = ["0.weight", "3.weight"]
    if method == "probmask flops":
        return Kernels(dict.fromkeys(names, 1), {"0.weight": 36, "3.weight": 1})
    if method == "probmask kernel":
        return Kernels({"0.weight": 9, "3.weight": 1}, None, by_layer=False)
    if method != "probmask channel":
        return None
    net = network()
    weights = {n: net.get_parameter(n) for n in names}
    made = Channels(coupling(net, weights, (3, 8, 8)), {n: w.shape for n, w in weights.items()}, None)
    made.expected(torch.ones(made.count))
    return made


def form_of(method: str, units: Any) -> RelaxedMask | FixedMask:
    search = Search(0.1, "global", 0.03, 0, 1, 3, 1, 0, units)
    if isinstance(units, Channels):
        (known,) = units._known.values()  # its fake twin, as there are no real tensors from here on
        fake = {f.name: getattr(known, f.name) for f in fields(known) if f.name != "columns"}
        fake = {n: torch.zeros(t.shape, dtype=t.dtype, device=CUDA) for n, t in fake.items()}
        columns = {n: torch.zeros(t.shape, dtype=t.dtype, device=CUDA) for n, t in known.columns.items()}
        units._known[CUDA] = replace(known, columns=columns, **fake)
        return RelaxedChannels(search, Sgd(), 0.1, units)
    if method == "probmask kernel":
        return RelaxedKernels(search, Sgd(), 0.1, units)
    return RelaxedMask(search, Sgd(), 0.1) if "probmask" in method else FixedMask(Sgd())


def step_on_a_fake_gpu(world: World, method: str, bf16: bool, spoil: str) -> str:
    """Three steps and an evaluation on rank 0 of fake ranks; what was raised, or ""."""
    compiled.load_kernels = lambda module: None  # type: ignore[assignment]  # Triton needs a driver
    with_fused_kernels(library := Library("aten", "IMPL"))
    world = World(world.rank, world.size, CUDA, world.group)
    units = units_of_network(method)
    try:
        with FakeTensorMode():
            with CUDA:
                net = network()
            weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
            others = {n: p for n, p in net.named_parameters() if p.ndim == 1}
            form = form_of(method, units)
            if spoil == "device":
                form.gradients = lambda g, state, part, draw: {"weight": g + torch.ones(g.shape)}  # type: ignore
            if spoil == "sync":
                form.constrain = lambda state, part, updates: float(state["weight"].sum())  # type: ignore
            groups = [ParameterGroup("prunable", weights, form, 0.1, bf16),
                      ParameterGroup("other", others, Plain({"weight": Sgd()}), 0.1)]  # fmt: skip
            placement = FakeZero(groups, world)
            optimizer = ShardedOptimizer(groups, clip=1.0, sampling=Sampling(0), placement=lambda _: placement)
            for _ in range(3):
                for number, group in enumerate(groups):
                    for position, p in enumerate(group.parameters.values()):
                        kind = torch.bfloat16 if group.bf16 else torch.float32
                        gradient = torch.randn(p.shape, dtype=kind, device=CUDA)
                        placement.reducer.add(number, position, gradient, sending=True)
                placement.reducer.end_backward(sending=True)
                optimizer.step()
            if "probmask" not in method:  # the most probable mask is decided on the host, once per evaluation
                optimizer.eval()
                optimizer.train()
            assert {t.dtype for s in optimizer.states for n, t in s.items() if n != "mask"} == {torch.float32}
            assert optimizer.divisor.device == CUDA
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        library._destroy()
    return ""


@pytest.mark.parametrize("method", ["probmask", "probmask flops", "probmask channel", "probmask kernel", "fixed"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_on_the_gpu_stays_there(method: str, bf16: bool) -> None:
    assert on_fake_ranks(step_on_a_fake_gpu, 8, method, bf16, "") == ""


def test_reading_a_value_on_the_host_would_be_seen() -> None:
    assert "DataDependent" in on_fake_ranks(step_on_a_fake_gpu, 8, "fixed", False, "sync")


def test_a_tensor_on_the_wrong_device_would_be_seen() -> None:
    assert "device" in on_fake_ranks(step_on_a_fake_gpu, 8, "fixed", False, "device")
