"""What only a GPU can show; skipped without one, and run by benchmarks/gpu.sh with it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import ghostmask
from ghostmask.engine.compiled import agree_on_kernels, load_kernels
from ghostmask.engine.world import World
from ghostmask.masks.kernels import KERNELS
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.methods.dnw import Largest
from ghostmask.masks.methods.edge_popup import Popup
from ghostmask.masks.methods.feather import CubicThreshold
from ghostmask.masks.methods.l0 import ChannelGates, WeightGates
from ghostmask.masks.methods.sparse_vd import Gaussian
from ghostmask.masks.methods.st3 import SoftThreshold
from ghostmask.masks.methods.str import TrainedThresholds
from ghostmask.masks.power import powered
from ghostmask.masks.scoring.topk import Budget
from ghostmask.masks.units.blocks import Blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

METHODS: dict[str, Callable[[], Callable[..., object]]] = {
    "probmask": lambda: ghostmask.probmask(0.1, 20, lr=0.05, start_fraction=0.0),
    "gmp": lambda: ghostmask.gmp(0.1, 20, every=2, start_fraction=0.0),
    "dnw": lambda: lambda rule, _: Largest(rule, Budget(0.1, "layerwise", 0, 3)),
    "st3 sigma": lambda: lambda rule, _: SoftThreshold(rule, Budget(0.1), 0, 2, sigma=True),
    "st3 2:4": lambda: lambda rule, _: SoftThreshold(rule, Budget(0.5, units=Blocks(2, 4)), 0, 2),
    "feather": lambda: lambda rule, _: CubicThreshold(rule, Budget(0.1), 0, 2, 0.5),
    "edge_popup": lambda: lambda rule, _: Popup(rule, Budget(0.1, min_per_layer=2)),
    "str": lambda: lambda rule, _: TrainedThresholds(rule, rule, -4.0),
    "sparse_vd": lambda: lambda rule, _: Gaussian(rule, 1.0, -8.0, 1e-4, ramp=5),
    "l0": lambda: lambda rule, _: WeightGates(rule, 1.0, 0.0, 1e-4),
    "l0 of channels": lambda: lambda rule, _: ChannelGates(rule, 1.0, 0.0, 1e-4),
    "a power": lambda: lambda rule, _: powered(FixedMask(rule), 2.0),
    "gmp layerwise": lambda: ghostmask.gmp(0.1, 20, every=2, start_fraction=0.0, constraint="layerwise"),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 49, 4),
    )  # fmt: skip


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    device = next(net.parameters()).device
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(16, 3, 32, 32, generator=generator).to(device)
        labels = torch.randint(4, (16,), generator=generator).to(device)
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_the_gpu_has_the_losses_of_one_on_the_cpu(method: str) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for device in ("cpu", "cuda"):
        net = network().to(device)
        found.append(train(net, ghostmask.optimizer(net, METHODS[method](), lr=0.05, clip=1.0), 10))
    assert found[1] == pytest.approx(found[0], abs=1e-3)


def test_the_kernels_for_this_gpu_compile() -> None:
    agree_on_kernels(World(0, 1, torch.device("cuda", 0)), KERNELS)
    for name in ("relaxed_mask", "projection", "radix"):
        assert load_kernels(f"ghostmask.masks.kernels.{name}_triton") is not None


@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_device(method: str) -> None:
    net = network().cuda()
    optimizer = ghostmask.optimizer(net, METHODS[method](), lr=0.05, clip=1.0)
    train(net, optimizer, 3)
    gradients = [torch.randn_like(p) for p in net.parameters()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p, g in zip(net.parameters(), gradients, strict=True):
            p.grad = g
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(optimizer.finite) == 1


def test_eval_and_train_come_back_bit_for_bit() -> None:
    net = network().cuda()
    optimizer = ghostmask.optimizer(net, METHODS["probmask"](), lr=0.05)
    train(net, optimizer, 3)
    before = copy.deepcopy(net.state_dict())
    optimizer.eval()
    optimizer.train()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
