"""Which networks can the finders score, what is done to the copy that they score, and what is said of the others?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ghostmask.engine.errors import InputError
from ghostmask.engine.world import single
from ghostmask.masks.scoring.gradient_scores import ScoreLoss
from ghostmask.masks.scoring.kronecker import KroneckerFactors, drawn_labels
from ghostmask.masks.scoring.score_images import Chunk
from ghostmask.masks.scoring.scored_copy import draw_classifier

FLAT = nn.Flatten()


def chunk(num: int = 6) -> Chunk:
    images = torch.randn(num, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return Chunk(images, torch.arange(num) % 4, torch.arange(num))


def chunks() -> Iterator[Chunk]:
    yield chunk()


def convolutions(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(inplace=True), *last)


def names_of(net: nn.Module) -> dict[str, Tensor]:
    layers = nn.Conv2d | nn.Linear | nn.ConvTranspose2d
    return {f"{n}.weight": m.weight for n, m in net.named_modules() if isinstance(m, layers)}


def score_loss(net: nn.Module, fresh_classifier: int | None = None) -> ScoreLoss:
    loss = ScoreLoss(net, names_of(net), chunks, single(), "grasp")
    if fresh_classifier is not None:
        draw_classifier(loss.twin, fresh_classifier)
    return loss


def kronecker(net: nn.Module) -> KroneckerFactors:
    factors = KroneckerFactors(net, list(names_of(net)), seed=3)
    factors.add(chunk())
    return factors


@pytest.mark.parametrize(
    ("last", "classifier"),
    [
        ((FLAT, nn.Linear(72, 30), nn.ReLU(), nn.Linear(30, 4)), "6.weight"),
        ((nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1, bias=False), FLAT), "4.weight"),
    ],
)
def test_a_fresh_classifier_is_xavier_normal_and_on_the_copy_alone(last: Any, classifier: str) -> None:
    net = convolutions(*last)
    before = copy.deepcopy(net.state_dict())
    loss, again, other = (score_loss(net, fresh_classifier=seed) for seed in (0, 0, 6))
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    drawn = {n for n, w in loss.weights.items() if not torch.equal(w, before[n])}
    assert drawn == {classifier}
    assert torch.equal(loss.weights[classifier], again.weights[classifier])
    assert not torch.equal(loss.weights[classifier], other.weights[classifier])
    many = torch.cat([score_loss(net, fresh_classifier=s).weights[classifier].flatten() for s in range(60)])
    fan_out, fan_in = before[classifier].shape[:2]
    assert float(many.detach().std()) == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.1)

    net.get_parameter(classifier).data.copy_(loss.weights[classifier].detach())
    for a, b in zip(loss.gradient(), score_loss(net).gradient(), strict=True):
        assert torch.equal(a, b), "the gradient is not that of the drawn classifier"


def test_without_a_classifier_nothing_is_drawn() -> None:
    net = convolutions(nn.Conv2d(8, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), FLAT)
    loss = score_loss(net, fresh_classifier=0)
    assert all(torch.equal(w, net.get_parameter(n)) for n, w in loss.weights.items())


def test_scores_do_not_depend_on_drop_out_or_the_networks_mode() -> None:
    net = convolutions(FLAT, nn.Dropout(0.5), nn.Linear(72, 4))
    state = torch.get_rng_state()
    first, second = (score_loss(net.train(training)).gradient() for training in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


class Unused(nn.Module):
    """A network with a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = convolutions(FLAT, nn.Linear(72, 4)), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def test_weights_that_the_network_does_not_use_have_no_gradient_and_no_curvature() -> None:
    loss = score_loss(Unused())
    gradient = loss.gradient()
    for found in (gradient, loss.hessian_product(gradient)):
        named = dict(zip(loss.weights, found, strict=True))
        assert not named.pop("spare.weight").any()
        assert all(slopes.any() for slopes in named.values())
    assert not any(factor.any() for factor in kronecker(Unused()).sums["spare.weight"])


class Tokens(nn.Module):
    """Linear layers on sequences: (N, T, C) -> (N, T, K)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(images.flatten(1, 2)).tanh()).mean(1)
        return logits


@pytest.mark.parametrize(
    "net",
    [
        convolutions(FLAT, nn.Linear(72, 4)),
        nn.Sequential(nn.Conv2d(3, 5, (2, 3), padding="same", padding_mode="reflect"), FLAT, nn.Linear(125, 4)),
        nn.Sequential(nn.Conv2d(3, 5, 3, padding="valid", stride=2), FLAT, nn.Linear(20, 4)),
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="circular"), FLAT, nn.Linear(175, 4)),
        Tokens(),
    ],
)
def test_kronecker_factors_are_those_of_each_output_by_the_weights_and_of_the_loss_by_each_output(
    net: nn.Module,
) -> None:
    """d y / d w of output channel 0 is the input that it saw: autograd says it for any padding."""
    factors, twin, images = kronecker(net), copy.deepcopy(net).eval(), chunk().images
    outputs: dict[str, Tensor] = {}
    for name in factors.weights:
        layer = twin.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    logits = twin(images)
    loss = functional.cross_entropy(logits, drawn_labels(logits.detach(), chunk().numbers, 3), reduction="sum")
    for name, (over_inputs, over_outputs) in factors.sums.items():
        dim, weight, y = (-1 if isinstance(net, Tokens) else 1), twin.get_parameter(name), outputs[name]
        uses = y.select(dim, 0).reshape(-1)
        seen = torch.stack([torch.autograd.grad(u, weight, retain_graph=True)[0][0].reshape(-1) for u in uses])
        torch.testing.assert_close(over_inputs, (seen.T @ seen).double(), rtol=1e-4, atol=1e-4)
        slopes = torch.autograd.grad(loss, y, retain_graph=True)[0].movedim(dim, -1).reshape(-1, len(weight))
        torch.testing.assert_close(over_outputs, (slopes.T @ slopes).double(), rtol=1e-4, atol=1e-5)


class Once(torch.autograd.Function):
    """A square with a first derivative only, as of many kernels that people write."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


class Call(nn.Module):
    """A function as the last layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def test_a_network_without_second_derivatives_is_refused_by_grasp_and_scored_by_snip() -> None:
    net = convolutions(FLAT, Call(Once.apply), nn.Linear(72, 4))
    loss = score_loss(net)
    gradient = loss.gradient()
    assert all(g.any() for g in gradient)
    with pytest.raises(InputError, match=r"mask\.method = 'grasp': needs second derivatives, .*; snip needs") as caught:
        loss.hessian_product(gradient)
    assert "\n" not in str(caught.value)


def test_other_errors_of_a_second_pass_are_not_the_networks() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            if gradients[0].grad_fn is None:
                raise RuntimeError("connection closed by peer")
            return gradients[0].clone()

    loss = score_loss(convolutions(FLAT, nn.Linear(72, 4), Call(Broken.apply)))
    vectors = [torch.ones_like(w) for w in loss.weights.values()]
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        loss.hessian_product(vectors)


@pytest.mark.parametrize(
    ("last", "given"),
    [
        ((nn.Conv2d(8, 4, 3),), r"\(6, 4, 1, 1\) for 6 images"),
        ((FLAT, nn.Linear(72, 4), Call(lambda x: (x, x))), "tuple for 6 images"),
        ((FLAT, nn.Linear(72, 4), Call(lambda x: x.sum(0, keepdim=True))), r"\(1, 4\) for 6 images"),
    ],
)
def test_a_network_without_one_row_of_logits_per_image_is_refused_in_one_line(last: Any, given: str) -> None:
    net = convolutions(*last)
    for method, score in (("grasp", lambda: score_loss(net).gradient()), ("mlprune", lambda: kronecker(net))):
        with pytest.raises(InputError, match=rf"mask\.method = '{method}': .*\(N, classes\); .*{given}") as caught:
            score()
        assert "\n" not in str(caught.value)


class Attention(nn.Module):
    """torch's attention uses the weights of its last layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(5, 1, batch_first=True), nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1, 2)
        logits: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
        return logits


@pytest.mark.parametrize(
    ("net", "name", "why"),
    [
        (convolutions(nn.Conv2d(8, 4, 3, groups=2), FLAT), "3.weight", "belongs to a grouped convolution"),
        (convolutions(nn.ConvTranspose2d(8, 1, 1), FLAT), "3.weight", "belongs to a ConvTranspose2d"),
        (Attention(), "attention.out_proj.weight", "is used without a call of its layer"),
    ],
)
def test_mlprune_names_the_layer_that_it_cannot_score(net: nn.Module, name: str, why: str) -> None:
    with pytest.raises(InputError, match=rf"mask\.method = 'mlprune': cannot score {name}, which {why}; name it in"):
        kronecker(net)
