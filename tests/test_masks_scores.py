"""Are the finders' scores those of the papers? Each against a slow, obvious computation in float64."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from memory_data import MemoryData
from small_steps import slope_by_differences
from torch import Tensor, nn
from torch.func import functional_call

from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.registry import resolve
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import single
from ghostmask.masks.method import Recipe
from ghostmask.masks.methods.grasp import TEMPERATURE, default_per_class
from ghostmask.masks.registry import METHODS
from ghostmask.masks.scoring.kronecker import drawn_labels
from ghostmask.masks.scoring.scored_copy import draw_classifier
from ghostmask.masks.scoring.topk import kept_count
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

RECIPE = Recipe(OptimConfig(), FinetuneConfig(), epochs=1, seed=3)


def tiny(seed: int = 0) -> nn.Module:
    """A smooth network of 180 prunable weights for 8 x 8 images: finite differences meet no kink."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
            bn1=nn.BatchNorm2d(4),
            act1=nn.Tanh(),
            conv2=nn.Conv2d(4, 3, (1, 3), padding=(0, 2), dilation=(1, 2)),
            act2=nn.Tanh(),
            pool=nn.AdaptiveAvgPool2d((1, 3)),
            flat=nn.Flatten(),
            fc=nn.Linear(9, 4),
        )
    )


def method_of(name: str, net: nn.Module, **settings: Any) -> Any:
    method = resolve(METHODS[name])
    return method(method.Settings(method=name, **settings), net, RECIPE, single())


def scores_of(method: Any, data: MemoryData) -> Tensor:
    scores: Tensor = method.scores(data, Slice.even(method.weights, method.world))
    return scores


def chunked(data: MemoryData, number: int, size: int, classes: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The images a score sees, in float64, taken from the epoch's batches one image at a time."""
    images, labels, left = [], [], [number] * classes
    for batch in data.train(0):
        for image, label in zip(batch.images, batch.labels, strict=True):
            kind = int(label) % classes
            left[kind] -= 1
            if left[kind] >= 0:
                images.append(image.double())
                labels.append(label)
    return list(zip(torch.stack(images).split(size), torch.stack(labels).split(size), strict=True))


def loss_of(net: nn.Module, chunks: list[tuple[Tensor, Tensor]], temperature: float = 1.0) -> Callable[[Tensor], float]:
    """Summed cross-entropy as a function of all prunable weights laid end to end, batch norm in training mode."""
    twin = tiny().double()
    twin.load_state_dict(net.state_dict())
    shapes = {n: p.shape for n, p in twin.named_parameters() if n in ("conv1.weight", "conv2.weight", "fc.weight")}

    @torch.no_grad()
    def loss(flat: Tensor) -> float:
        pieces = flat.split([s.numel() for s in shapes.values()])
        weights = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        total = 0.0
        for images, labels in chunks:
            log = (functional_call(twin, weights, (images,)) / temperature).log_softmax(1)
            total -= float(log[torch.arange(len(labels)), labels].sum())
        return total

    return loss


def flat_weights(method: Any) -> Tensor:
    return torch.cat([w.detach().double().reshape(-1) for w in method.weights.values()])


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def test_snip_scores_are_the_change_of_the_loss_with_each_mask_entry() -> None:
    net, data = tiny(), MemoryData(single())
    method = method_of("snip", net, score_batch=10, score_batches=2)
    loss, w = loss_of(net, chunked(data, 20, 10)), flat_weights(method)
    assert len(w) == 180
    by_mask = slope_by_differences(lambda mask: loss(mask * w), torch.ones_like(w), 1e-5)
    assert close(scores_of(method, data).double(), by_mask.abs(), 1e-5)


@pytest.mark.parametrize(("num_classes", "each"), [(4, 10), (100, 10), (101, 1), (1000, 1)])
def test_grasp_takes_ten_images_of_each_class_but_one_of_each_of_many(num_classes: int, each: int) -> None:
    assert default_per_class(num_classes) == each
    net, data = tiny(), MemoryData(single())
    data.num_classes = num_classes
    chosen, told = method_of("grasp", net), method_of("grasp", net, samples_per_class=each)
    other = method_of("grasp", net, samples_per_class=11 - each)
    assert torch.equal(scores_of(chosen, data), scores_of(told, data))
    assert not torch.equal(scores_of(chosen, data), scores_of(other, data))


def test_grasp_scores_are_minus_the_papers_by_differences_of_slope_by_differences() -> None:
    net, data = tiny(), MemoryData(single())
    method = method_of("grasp", net, score_batch=20, samples_per_class=3)
    chunks = chunked(data, 3, 7, classes=4)
    assert [len(labels) for _, labels in chunks] == [7, 5]
    assert torch.cat([labels for _, labels in chunks]).bincount().tolist() == [3, 3, 3, 3]
    scored = copy.deepcopy(net)
    draw_classifier(scored, RECIPE.seed)
    assert not torch.equal(scored.get_parameter("fc.weight"), net.get_parameter("fc.weight"))
    loss, w = loss_of(scored, chunks, TEMPERATURE), flat_weights(method_of("grasp", scored))
    g = slope_by_differences(loss, w, 1e-3)
    step = 0.02 / float(g.norm())
    hessian_g = (slope_by_differences(loss, w + step * g, 1e-3) - slope_by_differences(loss, w - step * g, 1e-3)) / (
        2 * step
    )
    assert close(scores_of(method, data).double(), w * hessian_g, 2e-3)
    removed_first = (-w * hessian_g).argsort(descending=True)[:20]
    masks = method_of("grasp", net, score_batch=20, samples_per_class=3, density=0.5).find(data)
    assert not torch.cat([m.reshape(-1) for m in masks.values()])[removed_first].any()


def linear(*widths: int) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    return nn.Sequential(nn.Flatten(), *layers)


class Shape(MemoryData):
    """Images of another shape: all that SynFlow reads of the data."""

    image_shape = (1, 2, 3)

    def __init__(self) -> None:
        pass


def test_synflow_on_a_linear_network_follows_its_closed_form() -> None:
    """R = 1' |W3| |W2| |W1| 1, and the score of W2[i, j] is (1' |W3|)_i |W2|_ij (|W1| 1)_j."""
    net = linear(6, 7, 5, 4)
    method = method_of("synflow", net, density=0.2, iterations=9)
    full = [w.detach().double().abs().numpy() for w in method.weights.values()]
    sizes = [m.size for m in full]
    masks = [np.ones_like(m) for m in full]
    for i in range(1, 10):
        one, two, three = (w * m for w, m in zip(full, masks, strict=True))
        ahead = [np.ones(4) @ three @ two, np.ones(4) @ three, np.ones(4)]
        behind = [np.ones(6), one @ np.ones(6), two @ one @ np.ones(6)]
        scores = [np.outer(a, b) * w for a, b, w in zip(ahead, behind, (one, two, three), strict=True)]
        flow = float(np.ones(4) @ three @ two @ one @ np.ones(6))
        assert all(abs(score.sum() - flow) < 1e-9 * flow for score in scores), "each layer holds all of the flow"
        flat = np.concatenate([np.where(m > 0, s, -1).ravel() for m, s in zip(masks, scores, strict=True)])
        kept = np.zeros(sum(sizes))
        kept[np.argsort(-flat, kind="stable")[: kept_count(0.2 ** (i / 9), sum(sizes))]] = 1
        masks = [p.reshape(m.shape) for p, m in zip(np.split(kept, np.cumsum(sizes)[:-1]), masks, strict=True)]
    found = method.find(Shape())
    assert all(np.array_equal(a.numpy(), b > 0) for a, b in zip(found.values(), masks, strict=True))


def test_synflow_scores_of_every_layer_of_a_convolutional_network_add_up_to_its_output() -> None:
    from ghostmask.masks.methods.synflow import flow_scores

    net = build_model(ModelConfig(name="conv4"), 4, (3, 8, 8), 3).double()
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    ones = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    totals = [float(s.sum()) for s in flow_scores(net, list(net.parameters()), ones)]
    assert totals == pytest.approx([float(net(ones).sum().detach())] * 7, rel=1e-9)


def patches(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs of each use of a layer's weights for one image, laid out as a row of its weight, by explicit loops."""
    if isinstance(layer, nn.Linear):
        yield x
        return
    assert isinstance(layer, nn.Conv2d)
    (ph, pw), (sh, sw), (dh, dw), (kh, kw) = layer.padding, layer.stride, layer.dilation, layer.kernel_size  # type: ignore[misc]
    padded = torch.zeros(x.shape[0], x.shape[1] + 2 * ph, x.shape[2] + 2 * pw, dtype=x.dtype)
    padded[:, ph : ph + x.shape[1], pw : pw + x.shape[2]] = x
    for top in range(0, padded.shape[1] - dh * (kh - 1), sh):
        for left in range(0, padded.shape[2] - dw * (kw - 1), sw):
            block = padded[:, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]
            yield block.reshape(-1)


def test_mlprune_scores_are_those_of_explicit_kronecker_products() -> None:
    net, data, damping = tiny(), MemoryData(single()), 0.01
    net(torch.randn(40, 3, 8, 8))  # running statistics other than 0 and 1
    method = method_of("mlprune", net, score_batch=6, score_batches=2, damping=damping)
    twin = tiny().double()
    twin.load_state_dict(net.state_dict())
    twin.eval()
    layers = {n: twin.get_submodule(n.removesuffix(".weight")) for n in method.weights}
    factors = {n: [torch.zeros(w[0].numel(), w[0].numel()).double(), torch.zeros(len(w), len(w)).double()]
               for n, w in method.weights.items()}  # fmt: skip
    images = torch.cat([images for images, _ in chunked(data, 12, 6)])
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    for number, image in enumerate(images):
        logits = twin(image[None])
        label = int(drawn_labels(logits.detach(), torch.tensor([number]), RECIPE.seed))
        gradients = torch.autograd.grad(-logits.log_softmax(1)[0, label], [seen[n][1] for n in layers])
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            for a in patches(layer, seen[name][0][0].detach()):
                factors[name][0] += torch.outer(a, a)
            for g in gradient[0].reshape(gradient.shape[1], -1).T:
                factors[name][1] += torch.outer(g, g)
    expected = []
    for name, w in method.weights.items():
        a, g = (m + damping * m.trace() / len(m) * torch.eye(len(m)) for m in factors[name])
        inverse = torch.linalg.inv(torch.kron(g, a)).diagonal()
        score = w.detach().double().reshape(-1) ** 2 / inverse
        expected.append(score / score.sum())
    assert close(scores_of(method, data), torch.cat(expected), 1e-4)


def test_labels_are_drawn_with_the_probabilities_of_the_network() -> None:
    logits = torch.tensor([0.1, 0.6, 0.05, 0.25]).log().expand(4000, 4) + 3
    labels = drawn_labels(logits, torch.arange(4000), 0)
    assert torch.allclose(labels.bincount() / 4000, torch.tensor([0.1, 0.6, 0.05, 0.25]), atol=0.025)
    assert torch.equal(drawn_labels(logits[:9], torch.arange(70, 79), 0), labels[70:79])


def test_masks_follow_the_scores() -> None:
    net, data = tiny(), MemoryData(single())
    method = method_of("snip", net, score_batch=20, density=0.3)
    masks = torch.cat([m.reshape(-1) for m in method.find(data).values()])
    scores = scores_of(method, data)
    assert int(masks.sum()) == kept_count(0.3, 180)
    assert scores[masks].min() >= scores[~masks].max()


@pytest.mark.parametrize("constraint", ["global", "layerwise"])
def test_magnitude_keeps_the_largest_weights_of_the_network_or_of_each_layer(constraint: str) -> None:
    method = method_of("magnitude", tiny(), density=0.3, constraint=constraint)
    sizes = [w.detach().double().abs().numpy().ravel() for w in method.weights.values()]
    found = [m.numpy().ravel() for m in method.find(MemoryData(single())).values()]
    parts = [(np.concatenate(sizes), np.concatenate(found))]
    for size, kept in parts if constraint == "global" else zip(sizes, found, strict=True):
        assert set(kept.nonzero()[0]) == set(np.argsort(-size)[: kept_count(0.3, len(size))])
