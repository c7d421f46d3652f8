"""Do ghost skips act where they should, as their formula says, and vanish without a trace?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ghostmask.engine.errors import InputError
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig
from ghostmask.models.ghosts import GhostedModel, Ghosts
from ghostmask.models.registry import MODELS
from ghostmask.models.tost import ghost_alpha

PLACES = {
    "resnet8": 6, "resnet20": 18, "resnet32": 30, "resnet18_cifar": 16, "resnet50_cifar": 16, "vgg19": 16,
    "digits_resnet": 6,
    "conv4": 4, "resnet18": 16, "resnet50": 16, "resnet9": 8,
}  # fmt: skip
"""3x3 convolutions in blocks (two per BasicBlock, one per Bottleneck), or in VGG, Conv-4 and ResNet-9."""


def net_of(name: str, size: int = 32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return build_model(ModelConfig(name), 4, (3, size, size), seed=1), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", MODELS)
def test_each_network_gets_its_ghosts_and_keeps_its_names(name: str) -> None:
    net, images = net_of(name)
    names, weights = list(net.state_dict()), list(prunable_weights(net))
    ghosts = Ghosts(net, seed=1)
    assert len(list(ghosts.children())) == PLACES[name]
    plain = net.eval()(images)
    ghosts.eval().attach()
    assert not torch.equal(net(images), plain)
    assert (list(net.state_dict()), list(prunable_weights(net))) == (names, weights)
    ghosts.detach()
    assert torch.equal(net(images), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_with_alpha_0_the_network_computes_the_plain_function_exactly() -> None:
    net, images = net_of("digits_resnet", 8)
    plain = net.eval()(images)
    ghosts = Ghosts(net, seed=1).eval()
    ghosts.set_alpha(0.0)
    ghosts.attach()
    assert torch.equal(net(images), plain)


def test_a_ghost_is_added_after_batch_norm_and_before_the_activation() -> None:
    net, images = net_of("digits_resnet", 8)
    ghosts = Ghosts(net.eval(), seed=1).eval()
    ghosts.set_alpha(0.3)
    block, x = net.get_submodule("layer2.0"), torch.randn(2, 32, 8, 8)
    first, second = (ghosts.get_submodule(f"layer2/0/conv{i}") for i in (1, 2))
    middle = (block.bn1(block.conv1(x)) + 0.3 * first(x)).relu()
    out = (block.bn2(block.conv2(middle)) + 0.3 * second(middle) + block.downsample(x)).relu()
    ghosts.attach()
    torch.testing.assert_close(block(x), out)
    ghosts.detach()
    conv4, images = net_of("conv4", 8)
    skip = Ghosts(conv4, seed=1).eval()
    skip.attach()
    pre = next(iter(conv4.features))
    own = torch.nn.functional.conv2d(images, pre.weight, padding=1)
    torch.testing.assert_close(pre(images), own + skip.get_submodule("features/0")(images))


def test_ghosts_work_with_replaced_weights_and_get_gradients() -> None:
    net, images = net_of("digits_resnet", 8)
    ghosted = GhostedModel(net, Ghosts(net, seed=1))
    ghosted.ghosts.attach()
    halved = {n: w * 0.5 for n, w in prunable_weights(net).items()}
    functional_call(net, halved, (images,)).square().sum().backward()
    grads = [p.grad for p in ghosted.ghosts.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    ghosted.remove()
    assert not [n for n, _ in ghosted.named_parameters() if "ghost" in n]


def test_the_initialisation_is_the_seeds_and_draws_from_no_generator() -> None:
    net, _ = net_of("digits_resnet", 8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (Ghosts(net, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["layer1/0/conv1.0.weight"], other["layer1/0/conv1.0.weight"])


def test_alpha_falls_linearly_to_exactly_0_and_stays_there() -> None:
    assert [ghost_alpha(done, 0.3) for done in (0.0, 0.15, 0.3, 0.31, 1.0)] == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.0])
    assert ghost_alpha(0.3, 0.3) == ghost_alpha(1.0, 0.3) == 0.0


def test_a_network_without_3x3_convolutions_is_refused() -> None:
    with pytest.raises(InputError, match=r"tost.ghost_skip = True: this network has no 3x3"):
        Ghosts(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), seed=0)
