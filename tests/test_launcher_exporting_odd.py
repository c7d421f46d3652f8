"""Is a network with an unusual forward pass exported as what it computes, or refused in one line: never another one?"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparse_exports import DIGITS, export
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from ghostmask.engine.errors import InputError
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.exporting.network_file import network_source
from ghostmask.launcher.exporting.small import shrink
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

Forward = Callable[[nn.Module, Tensor], Any]


class Odd(nn.Module):
    """Two convolutions and a linear layer, of which a part is replaced; `layers` go by their names."""

    def __init__(self, middle: Forward | None = None, head: Forward | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 4)
        self.middle, self.head = middle, head
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images: Tensor) -> Any:
        x = self.norm1(self.conv1(images)).relu()
        x = self.middle(self, x) if self.middle else self.conv2(x).relu()
        return self.head(self, x) if self.head else self.fc(x.mean((2, 3)))


def pooled(x: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(x, 1)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def written_in_place(net: Any, x: Tensor) -> Tensor:
    before = net.conv3(x)
    return net.conv2(net.relu(before) + before)  # twice the same tensor: relu wrote in it


def called_twice(net: Any, x: Tensor) -> Tensor:
    x = net.conv2(x)
    return net.norm2(net.conv4(net.norm2(net.conv4(x)).relu())).relu()


def chunks(net: Any, x: Tensor) -> Tensor:
    one, two = x.chunk(2, 1)
    return net.conv4(one * two.sigmoid())


def rows(net: Any, x: Tensor) -> Tensor:
    parts = x.unbind(2)
    return net.fc((parts[0] + parts[1]).mean(2))


def conditions(net: Any, x: Tensor) -> Tensor:
    positive = x > 0
    both = operator.and_(positive, x < 1)
    return net.conv2(x * positive * both)


def adds_in_place(net: Any, x: Tensor) -> Tensor:
    y = net.conv3(x)
    y += x
    return net.conv2(y.relu_())


FORWARDS: dict[str, Callable[[], Odd]] = {
    "view, a number": lambda: Odd(head=lambda net, x: net.fc(pooled(x).view(-1, 8))),
    "view, a tuple": lambda: Odd(head=lambda net, x: net.fc(pooled(x).view((x.size(0), 8)))),
    "view, sizes": lambda: Odd(head=lambda net, x: net.fc(pooled(x).view(x.size(0), -1))),
    "reshape": lambda: Odd(head=lambda net, x: net.fc(torch.reshape(pooled(x), (-1, 8)))),
    "two views": lambda: Odd(head=lambda net, x: net.fc(pooled(x).view(-1, 8, 1).view(-1, 8))),
    "view of pixels": lambda: Odd(head=lambda net, x: net.fc(x.view(-1, 512)), fc=nn.Linear(512, 4)),
    "permute": lambda: Odd(head=lambda net, x: net.fc(x.permute(0, 2, 3, 1).reshape(-1, 64, 8)).mean(1)),
    "chunk": lambda: Odd(chunks, conv4=nn.Conv2d(8, 8, 3, padding=1)),
    "unbind": lambda: Odd(head=rows),
    "cat": lambda: Odd(lambda net, x: net.conv3(torch.cat([net.conv2(x), x], 1)), conv3=nn.Conv2d(24, 8, 1)),
    "broadcast": lambda: Odd(lambda net, x: net.conv2(x + net.conv3(x)).relu(), conv3=nn.Conv2d(16, 1, 1)),
    "gate": lambda: Odd(lambda net, x: net.conv2(x * net.conv3(x.mean((2, 3), keepdim=True)).sigmoid()),
                        conv3=nn.Conv2d(16, 16, 1)),
    "functional": lambda: Odd(lambda net, x: functional.conv2d(x, net.conv2.weight, net.conv2.bias).relu()),
    "a layer's weight, read": lambda: Odd(
        head=lambda net, x: functional.linear(net.up(net.fc(x.mean((2, 3)))).relu(), net.fc.weight), up=nn.Linear(4, 8)
    ),
    "called twice": lambda: Odd(called_twice, conv4=nn.Conv2d(8, 8, 1), norm2=nn.BatchNorm2d(8)),
    "norm of tokens": lambda: Odd(head=lambda net, x: net.out(net.norm2(net.wide(tokens(x))).mean(1)),
                                  wide=nn.Linear(8, 64), norm2=nn.BatchNorm1d(64), out=nn.Linear(64, 4)),
    "norm of other tokens": lambda: Odd(head=lambda net, x: net.fc(net.norm2(net.wide(tokens(x))).mean(1)),
                                        wide=nn.Linear(8, 8), norm2=nn.BatchNorm1d(64)),
    "ceiling": lambda: Odd(lambda net, x: net.conv2(net.pool(x)).relu(), pool=nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "reflection": lambda: Odd(conv2=nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")),
    "upsample": lambda: Odd(lambda net, x: net.conv2(net.up(x)), up=nn.Upsample(scale_factor=2, mode="bilinear")),
    "shuffle": lambda: Odd(lambda net, x: net.conv4(net.up(x)), up=nn.PixelShuffle(2), conv4=nn.Conv2d(4, 8, 1)),
    "group norm": lambda: Odd(lambda net, x: net.group(net.conv2(x)).relu(), group=nn.GroupNorm(4, 8)),
    "layer norm": lambda: Odd(head=lambda net, x: net.fc(net.norm2(x.mean((2, 3)))), norm2=nn.LayerNorm(8)),
    "dropout": lambda: Odd(head=lambda net, x: net.fc(net.drop(x.mean((2, 3)))), drop=nn.Dropout(0.5)),
    "in place": lambda: Odd(written_in_place, relu=nn.ReLU(inplace=True), conv3=nn.Conv2d(16, 16, 1)),
    "added in place": lambda: Odd(adds_in_place, conv3=nn.Conv2d(16, 16, 1)),
    "no arguments": lambda: Odd(lambda net, x: net.conv2(net.act(x)), act=nn.Hardswish(inplace=True)),
    "stochastic depth": lambda: Odd(lambda net, x: net.conv2(net.deep(x) + x), deep=StochasticDepth(0.5, "row")),
    "conditions": lambda: Odd(conditions),
    "type": lambda: Odd(lambda net, x: net.conv2(x.float()).relu()),
    "keyword": lambda: Odd(lambda net, x: net.conv2(net.norm2(input=x)).relu(), norm2=nn.BatchNorm2d(16)),
    "never called": lambda: Odd(rest=nn.Conv2d(3, 3, 3)),
    "lists": lambda: Odd(lambda net, x: net.conv2(x * net.many[0]), many=nn.ParameterList([torch.ones(16, 1, 1)])),
}  # fmt: skip


def sparse(net: nn.Module) -> nn.Module:
    """Zeros in rows and columns, batch norm as after training; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight[:1].numel() ** 0.5)
            if weight.dim() > 1:
                weight[::3] = 0
                weight[:, 1::4] = 0 if weight.shape[1] > 3 else weight[:, 1::4]
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.uniform_(-0.2, 0.2, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


@pytest.mark.parametrize("name", FORWARDS)
def test_small_and_network_file_compute_what_the_network_does(name: str) -> None:
    net = sparse(FORWARDS[name]())
    images = 2 * torch.randn(5, *DIGITS)
    small = shrink(net, DIGITS).graph
    for made in (net, small):
        space: dict[str, Any] = {"__name__": "network"}
        exec(network_source(made, "A network.", DIGITS, 4), space)
        built = space["Network"]()
        built.load_state_dict(made.state_dict())
        with torch.no_grad():
            expected = net(images.clone())
            for outputs in (small(images.clone()), built.eval()(images.clone())):
                assert float((outputs - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_views_however_they_name_their_numbers_stand_in_nobody_s_way() -> None:
    removed = [shrink(sparse(FORWARDS[name]()), DIGITS).removed for name in list(FORWARDS)[:4]]
    assert removed[0]["conv2"][1] < 8
    assert removed == [removed[0]] * 4


def aliased(net: Any, x: Tensor) -> Tensor:
    x = same = net.conv3(x)
    x += same.relu()
    return net.conv2(x * same)  # torch.fx takes += for x = x + ..., which leaves the other name alone


REFUSED: dict[str, tuple[Callable[[], Odd], str]] = {
    "two outputs": (lambda: Odd(head=lambda net, x: (net.fc(x.mean((2, 3))), x)), "returns a tuple and not the logits"),
    "random": (lambda: Odd(head=lambda net, x: net.fc(functional.dropout(x.mean((2, 3))))), "draws random numbers"),
    "aliased": (lambda: Odd(aliased, conv3=nn.Conv2d(16, 16, 1)), "or writes in place to what has another name"),
    "branch": (lambda: Odd(lambda net, x: net.conv2(x) if x.shape[1] == 16 and x.sum() > 0 else x), "control flow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_the_same_is_refused_in_one_line(name: str) -> None:
    make, why = REFUSED[name]
    net = sparse(make())
    with pytest.raises(InputError, match=rf"cannot be made small: .*{why}.*; export it as safetensors or packed"):
        shrink(net, DIGITS)
    with pytest.raises(InputError, match=rf"the network cannot be written .*{why}"):
        network_source(net, "A network.", DIGITS, 4)


def never_called(num_classes: int) -> nn.Module:
    """A user's own network."""
    return FORWARDS["never called"]()


def test_a_run_of_a_network_with_a_layer_that_is_never_called_ends_with_an_export(tmp_path: Any) -> None:
    name = f"{__name__}:never_called"
    export(tmp_path, build_model(ModelConfig(name), 4, DIGITS, 0).eval(), name, DIGITS)
    assert "rest" in (tmp_path / "network.py").read_text()
    assert run_command(["export", str(tmp_path), "--format", "small"]) == 0
