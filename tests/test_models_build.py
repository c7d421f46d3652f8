"""Is every network built as published, with an initialisation that is the seed's alone?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from ghostmask.engine.errors import InputError
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model, check_part
from ghostmask.models.config import ModelConfig
from ghostmask.models.registry import MODELS

SMALL, LARGE = (3, 32, 32), (3, 224, 224)
PUBLISHED = [
    ("resnet20", 10, SMALL, 22, 1_081_440),
    ("resnet32", 10, SMALL, 34, 1_855_584),
    ("resnet32", 100, SMALL, 34, 1_867_104),
    ("vgg19", 10, SMALL, 17, 20_024_000),
    ("vgg19", 100, SMALL, 17, 20_070_080),
    ("conv4", 10, SMALL, 7, 2_425_024),
    ("digits_resnet", 10, (3, 8, 8), 10, 307_296),
    ("resnet18", 1000, LARGE, 21, 11_678_912),
    ("resnet50", 1000, LARGE, 54, 25_502_912),
]


@pytest.mark.parametrize(("name", "classes", "shape", "tensors", "weights"), PUBLISHED)
def test_prunable_counts_are_the_published_ones(
    name: str, classes: int, shape: tuple[int, int, int], tensors: int, weights: int
) -> None:
    prunable = prunable_weights(build_model(ModelConfig(name), classes, shape, seed=0))
    assert (len(prunable), sum(w.numel() for w in prunable.values())) == (tensors, weights)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_registered_network_trains_on_its_images(name: str) -> None:
    net = build_model(ModelConfig(name), 7, SMALL, seed=0)
    logits = net(torch.randn(2, *SMALL))
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", ["digits_resnet", "resnet20", "conv4", "resnet18_cifar"])
def test_small_networks_take_eight_pixel_images(name: str) -> None:
    assert build_model(ModelConfig(name), 10, (3, 8, 8), seed=0)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_initialisation_depends_on_the_seed_alone_and_leaves_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_model(ModelConfig("digits_resnet"), 10, SMALL, seed=11).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = build_model(ModelConfig("digits_resnet"), 10, SMALL, seed=11).state_dict()
    other = build_model(ModelConfig("digits_resnet"), 10, SMALL, seed=12).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("name", ["resnet20", "conv4", "vgg19"])
def test_cifar_networks_start_kaiming_normal_over_fan_in(name: str) -> None:
    for weight in prunable_weights(build_model(ModelConfig(name), 100, SMALL, seed=3)).values():
        fan_in = weight[0].numel()
        error = 5 / (2 * weight.numel()) ** 0.5  # five standard errors of a normal sample's standard deviation
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=error)
        assert abs(weight.mean().item()) < 5 * (2 / fan_in / weight.numel()) ** 0.5


@pytest.mark.parametrize(("ours", "theirs"), [("resnet18_cifar", "resnet18"), ("resnet50_cifar", "resnet50")])
def test_cifar_resnets_are_torchvisions_with_another_stem_and_no_bias(ours: str, theirs: str) -> None:
    reference = getattr(resnet, theirs)(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    reference.fc = nn.Linear(reference.fc.in_features, 10, bias=False)
    net = build_model(ModelConfig(ours), 10, SMALL, seed=0)
    reference.load_state_dict(net.state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net.eval()(images), reference.eval()(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_resnets_are_torchvisions(name: str) -> None:
    net = build_model(ModelConfig(name), 1000, LARGE, seed=0)
    reference = getattr(resnet, name)()
    assert [(n, t.shape) for n, t in net.state_dict().items()] == [
        (n, t.shape) for n, t in reference.state_dict().items()
    ]
    reference.load_state_dict(net.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(net.eval()(images), reference.eval()(images))


def test_a_class_count_that_is_not_the_datasets_is_refused() -> None:
    build_model(ModelConfig("digits_resnet", num_classes=10), 10, SMALL, seed=0)
    with pytest.raises(InputError, match=r"model.num_classes = 100: the dataset has 10 classes; use 10 or 0"):
        build_model(ModelConfig("digits_resnet", num_classes=100), 10, SMALL, seed=0)


@pytest.mark.parametrize(
    ("name", "shape", "fix"),
    [
        ("vgg19", (3, 8, 8), "at least 32x32 pixels, the dataset has 8x8"),
        ("vgg19", (3, 64, 31), "at least 32x32 pixels, the dataset has 64x31"),
        ("resnet50", (3, 31, 31), "at least 32x32"),
        ("conv4", (3, 3, 3), "at least 4x4"),
        ("resnet20", (3, 2, 2), "at least 4x4"),
        ("resnet50", (1, 224, 224), "3 channels, the dataset has 1"),
    ],
)
def test_images_a_network_cannot_take_are_refused(name: str, shape: tuple[int, int, int], fix: str) -> None:
    with pytest.raises(InputError, match=rf"model.name = '{name}': needs images of .*{fix}"):
        build_model(ModelConfig(name), 10, shape, seed=0)


def test_one_image_per_part_is_refused_only_where_batch_norm_cannot_train_on_it() -> None:
    net = build_model(ModelConfig(name="resnet18_cifar"), 10, (3, 8, 8), 0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(InputError, match=r"data\.batch_size = 4: each of 4 parts .* has one image.*; give at least 8"):
        check_part(net, (3, 8, 8), 4, 4)
    check_part(net, (3, 8, 8), 8, 4)
    check_part(net, (3, 32, 32), 4, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
