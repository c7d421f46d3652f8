"""Does a soft activation reach every ReLU of every network, end as ReLU, and leave no trace?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghostmask.engine.errors import InputError
from ghostmask.models.activations import SoftActivation, require_relus, soften, zeros_after_activations
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig, TostConfig
from ghostmask.models.registry import MODELS
from ghostmask.models.tost import GhostSwish, pswish_beta


class Calls(TorchDispatchMode):
    """Counts the operators that a forward pass runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})

    def count(self, word: str) -> int:
        return sum(name.rstrip("_") == word for name in self.names)


def net_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return build_model(ModelConfig(name), 4, (3, 32, 32), seed=1), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", MODELS)
def test_every_relu_of_every_network_is_replaced_and_put_back(name: str) -> None:
    net, images = net_of(name)
    names, modules = list(net.state_dict()), list(net.named_modules())
    net.eval()
    plain = net(images)
    with Calls() as before:
        net(images)
    harden = soften(net, "swish", torch.ones(()))
    assert list(net.state_dict()) == names
    assert [n for n, _ in net.named_parameters()] == [n for n in names if n in dict(net.named_parameters())]
    with Calls() as soft:
        net(images)
    harden()
    assert before.count("relu") == soft.count("silu") > 0
    assert soft.count("relu") == soft.count("clamp_min") == 0
    assert list(net.named_modules()) == modules
    assert torch.equal(net(images), plain)


def test_a_network_without_relus_is_refused() -> None:
    require_relus(nn.Sequential(nn.Linear(12, 3), nn.ReLU()))
    with pytest.raises(InputError, match=r"tost.ghost_swish = True: this network has no nn.ReLU"):
        GhostSwish(TostConfig(ghost_swish=True), nn.Sequential(nn.Linear(12, 3), nn.GELU()))


def test_pswish_is_its_formula_at_every_beta() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    for beta in (1.0, 2.0, 17.0, 100.0):
        soft = SoftActivation("pswish", torch.tensor(beta))
        torch.testing.assert_close(soft(x.float()).double(), x * torch.sigmoid(beta * x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(SoftActivation("swish", torch.ones(()))(x), x * torch.sigmoid(x))
    torch.testing.assert_close(SoftActivation("mish", torch.ones(()))(x), x * torch.tanh(torch.log1p(x.exp())))


def test_beta_grows_geometrically_from_1_and_is_relu_from_the_fraction_on() -> None:
    betas = [pswish_beta(done, 0.5, 100.0) for done in (0.0, 0.125, 0.25, 0.375)]
    assert betas == pytest.approx([1.0, 100**0.25, 10.0, 100**0.75])
    assert pswish_beta(0.4999, 0.5, 100.0) < 100
    assert pswish_beta(0.5, 0.5, 100.0) == pswish_beta(1.0, 0.5, 100.0) == float("inf")


def test_zeros_are_counted_at_every_call_of_an_activation() -> None:
    net, images = net_of("digits_resnet")
    net.eval()
    outputs: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, n=name: outputs.setdefault(n, []).append(out.clone()))
        for name, module in net.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    modules = list(net.named_modules())
    net(images)
    for handle in handles:
        handle.remove()
    expected = {f"{n}.{i}": (int((o == 0).sum()), o.numel()) for n, outs in outputs.items() for i, o in enumerate(outs)}
    counted = zeros_after_activations(net, lambda: net(images))
    assert {n: (int(zeros), total) for n, (zeros, total) in counted.items()} == expected
    assert len(expected) == 7
    assert list(net.named_modules()) == modules
    harden = soften(net, "pswish", torch.ones(()))
    soft = zeros_after_activations(net, lambda: net(images))
    harden()
    assert soft.keys() == expected.keys()
    assert sum(int(zeros) for zeros, _ in soft.values()) == 0
