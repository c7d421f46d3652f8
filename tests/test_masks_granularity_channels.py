"""Whole channels: which hang together, what removing them changes, and budgets and probabilities of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from granular import masks_of, network, scores_of, settings, units
from mask_reference import bounded, relaxed_mask
from torch import Tensor

from ghostmask.engine.sharding.reparametrization import Draw
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.granularity import units_of
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.relaxed import Search
from ghostmask.masks.relaxed_channels import RelaxedChannels
from ghostmask.masks.scoring.topk import Budget, hashed
from ghostmask.masks.units.channels import Channels
from ghostmask.models.flops import uses_of
from ghostmask.models.registry import MODELS

# Channels


@pytest.mark.parametrize("name", [*MODELS, "bottleneck", "depthwise", "mobilenet_v3_small"])
def test_what_is_left_of_removed_channels_changes_nothing(name: str) -> None:
    """Their rows and the columns behind them are 0, and whatever their batch norms and biases are, logits stay."""
    made, weights, net, shape = units(name, granularity="channel", density=0.4)
    assert isinstance(made, Channels)
    masks = masks_of(made, scores_of(weights), Budget(0.4, units=made))
    removed = torch.cat([made.removed(masks), torch.zeros(1, dtype=torch.bool)])
    assert 0.2 < float(removed.double().mean()) < 0.8
    for n, mask in masks.items():
        rows, columns = made.coupling.rows[n], made.coupling.columns[n]
        gone = removed[rows][:, None] | (torch.zeros(1, 1, dtype=torch.bool) if columns is None else removed[columns])
        assert torch.equal(mask.reshape(*mask.shape[:2], -1).any(2) & ~gone, mask.reshape(*mask.shape[:2], -1).all(2))
        weights[n].data.mul_(mask)
    net.eval()
    images, found = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)), []
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for value in (0.3, -2.0):
            changed = 0
            for vector, numbers in made.coupling.vectors.items():
                if vector in parameters:
                    parameters[vector][removed[numbers]] = value
                    changed += int(removed[numbers].sum())
            assert changed or name == "conv4"
            found.append(net(images))
    assert torch.equal(*found)
    assert float(found[0].std()) > 0


RESIDUAL = {
    "resnet20": [
        ["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"],
        ["layer2.0.downsample.0", "layer2.0.conv2", "layer2.1.conv2", "layer2.2.conv2"],
    ],
    "resnet18": [["conv1", *(f"layer1.{b}.conv2" for b in range(2))]],
    "resnet50": [["layer4.0.downsample.0", *(f"layer4.{b}.conv3" for b in range(3))]],
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_channels_that_are_added_are_kept_or_removed_together_and_others_by_themselves(name: str) -> None:
    made, weights, _, _ = units(name, granularity="channel", density=0.3)
    masks = masks_of(made, scores_of(weights), Budget(0.3, units=made))
    rows = {n.removesuffix(".weight"): m.flatten(1).any(1) for n, m in masks.items()}
    added = [set(names) for names in RESIDUAL[name]]
    for names in RESIDUAL[name]:
        kept = [rows[n] for n in names]
        assert all(torch.equal(k, kept[0]) for k in kept)
        assert 0 < int(kept[0].sum()) < len(kept[0])
        consumers = {"resnet20": "layer1.1.conv1", "resnet18": "layer1.1.conv1", "resnet50": "layer4.1.conv1"}[name]
        if names is RESIDUAL[name][0]:
            assert torch.equal(masks[f"{consumers}.weight"].transpose(0, 1).flatten(1).any(1), kept[0])
    single_one = made.coupling.rows["layer1.0.conv1.weight"]
    others = torch.cat([made.coupling.rows[n] for n in weights if n != "layer1.0.conv1.weight"])
    assert not bool(torch.isin(single_one, others).any())
    assert bool(rows["fc"].all()), "a class was removed"
    assert len(added) == len(RESIDUAL[name])


def masks_with(made: Channels, kept: Tensor, weights: dict[str, Any]) -> dict[str, Tensor]:
    """Element by element, what is left where these channels are kept."""
    whole, masks = torch.cat([kept, torch.ones(1, dtype=torch.bool)]), {}
    for n, w in weights.items():
        columns = made.coupling.columns[n]
        mask = torch.ones(w.shape, dtype=torch.bool) & whole[made.coupling.rows[n]].view(-1, *[1] * (w.dim() - 1))
        masks[n] = mask if columns is None else mask & whole[columns].view(1, -1, *[1] * (w.dim() - 2))
    return masks


def counted(made: Channels, kept: Tensor, weights: dict[str, Any], uses: dict[str, int]) -> int:
    """The cost of that network."""
    return sum(int(m.sum()) * uses[n] for n, m in masks_with(made, kept, weights).items())


@pytest.mark.parametrize("budget", ["weights", "flops"])
@pytest.mark.parametrize("name", ["bottleneck", "depthwise"])
def test_channels_are_the_longest_beginning_of_the_ranking_whose_network_fits(name: str, budget: str) -> None:
    made, weights, net, shape = units(name, granularity="channel", density=0.5, budget=budget)
    assert isinstance(made, Channels)
    uses = uses_of(net, shape) if budget == "flops" else dict.fromkeys(weights, 1)
    scores = scores_of(weights, coarse=True)
    sums: dict[int, list[float]] = {}
    for n, w in scores.items():
        shares = (w.double() / w.double().mean()).float()
        for row, number in zip(shares.flatten(1), made.coupling.rows[n].tolist(), strict=True):
            sums.setdefault(number, []).extend(row.tolist())
    means = {k: sum(v) / len(v) for k, v in sums.items() if k < made.count}
    ties = hashed(torch.arange(made.count), 5).tolist()
    order = sorted(means, key=lambda k: (-means[k], -ties[k]))
    whole = counted(made, torch.ones(made.count, dtype=torch.bool), weights, uses)
    for density in (0.5, 0.85, 1.0):
        kept = torch.zeros(made.count, dtype=torch.bool)
        for number in order:
            kept[number] = True
            if counted(made, kept, weights, uses) > round(density * whole):
                kept[number] = False
                break
        masks = masks_of(made, scores, Budget(density, seed=5, units=made))
        wanted = masks_with(made, kept, weights)
        assert all(torch.equal(masks[n], wanted[n]) for n in weights), density
        assert sum(int(m.sum()) * uses[n] for n, m in masks.items()) == counted(made, kept, weights, uses)


def test_layerwise_channels_keep_the_same_share_of_every_layers() -> None:
    made, weights, _, _ = units("resnet20", granularity="channel", constraint="layerwise", density=0.25)
    masks = masks_of(made, scores_of(weights), Budget(0.25, "layerwise", units=made))
    shares = [float(m.flatten(1).any(1).double().mean()) for n, m in masks.items() if n != "fc.weight"]
    assert max(shares) - min(shares) <= 1 / 32
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert 0.24 < kept / total <= 0.25


def test_protected_channels_stay_in_every_layer() -> None:
    made, weights, _, _ = units("bottleneck", granularity="channel", min_per_layer=2, density=0.2)
    uneven = scores_of(weights)
    uneven["layer1.1.conv1.weight"][0] *= 1000  # beside it the others of its layer are nothing
    masks = masks_of(made, uneven, Budget(0.2, min_per_layer=2, units=made))
    assert all(int(m.flatten(1).any(1).sum()) >= 2 for m in masks.values())
    bare = masks_of(made, uneven, Budget(0.2, units=made))
    assert int(bare["layer1.1.conv1.weight"].flatten(1).any(1).sum()) == 1


def test_channels_that_a_dense_layer_makes_or_takes_stay() -> None:
    net, shape = network("bottleneck")
    weights = prunable_weights(net, exclude=("fc.weight", "layer1.0.conv2.weight"))
    made = units_of(settings(granularity="channel", density=0.5), net, weights, shape, dict)
    assert isinstance(made, Channels)
    masks = masks_of(made, scores_of(weights), Budget(0.5, units=made))
    rows = {n: m.flatten(1).any(1) for n, m in masks.items()}
    assert bool(rows["layer2.0.conv3.weight"].all())
    assert bool(rows["layer1.0.conv1.weight"].all())
    assert not bool(rows["layer1.1.conv1.weight"].all())


# Probabilities of channels


def relaxed(made: Channels, density: float = 0.3) -> RelaxedChannels:
    search = Search(density, "global", 0.03, 0, 1, 2, 4, 3, made)
    form = RelaxedChannels(search, Sgd(), 0.3, made)
    form.temperature, form.density = 0.6, density
    return form


def channel_step(
    world: World, made: Channels, weights: dict[str, Tensor], gradient: dict[str, Tensor]
) -> dict[str, Any]:
    """Weights, gradients, the projected probabilities and the mask of one update on this many ranks."""
    part = Slice(Layout({n: w.shape for n, w in weights.items()}, world.size, 500 if world.size > 1 else 0, 2), world)
    form = relaxed(made)
    state = form.start(part.cut(weights), part)
    state["probability"].copy_(
        torch.rand(made.count, generator=torch.Generator().manual_seed(4)).mul_(1.2).clamp_(0, 1)
    )
    found: dict[str, Any] = {"s": state["probability"].clone(), "theta": part.gathered(form.weights(state, part, DRAW))}
    slopes = form.gradients(part.cut(gradient), state, part, DRAW)
    found |= {"d weight": part.gathered(slopes["weight"]), "d probability": slopes["probability"]}
    state["probability"].add_(slopes["probability"].sign(), alpha=0.1)
    found["z"] = state["probability"].clone()
    form.constrain(state, part, 1)
    found |= {"projected": state["probability"].clone(), "v": float(form.threshold)}
    return found | {
        "mask": part.gathered(form.mask(state, part)),
        "sample": part.gathered(form.sampled(state, part, 1)),
    }


DRAW = Draw(3, 17, 1)


def mask_product(made: Channels, masks: Tensor, name: str, shape: torch.Size) -> Tensor:
    whole, columns = torch.cat([masks, masks.new_ones(1)]), made.coupling.columns[name]
    rows = whole[made.coupling.rows[name]].view(-1, *[1] * (len(shape) - 1))
    return (rows if columns is None else rows * whole[columns].view(1, -1, *[1] * (len(shape) - 2))).expand(shape)


@pytest.mark.parametrize("name", ["bottleneck", "depthwise"])
def test_gradients_of_channel_probabilities_are_those_of_float64_autograd_on_any_ranks(name: str) -> None:
    made, weights, _, _ = units(name, granularity="channel", density=0.5)
    given = {n: w.detach().clone() for n, w in weights.items()}
    gradient = {n: t - 0.8 for n, t in scores_of(weights).items()}
    found = channel_step(single(), made, given, gradient)
    s = found["s"].double().requires_grad_()
    masks = relaxed_mask(s, 0, DRAW, 0.6)
    leaves = {n: w.double().requires_grad_() for n, w in given.items()}
    theta = {n: w * mask_product(made, masks, n, w.shape) for n, w in leaves.items()}
    sum((theta[n] * gradient[n].double()).sum() for n in theta).backward()  # type: ignore[union-attr]
    assert s.grad is not None
    for n in given:
        assert torch.allclose(found["theta"][n].double(), theta[n].detach(), rtol=1e-5, atol=1e-7)
        assert torch.allclose(found["d weight"][n].double(), leaves[n].grad, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]
    wanted = bounded(s.grad, s.detach())
    assert torch.allclose(found["d probability"].double(), wanted, rtol=1e-4, atol=1e-5)
    for ranks in (2, 4) if name == "bottleneck" else ():
        for other in run_distributed(channel_step, ranks, made, given, gradient):
            for key, value in found.items():
                same = other[key] if isinstance(value, dict) else {"": other[key]}
                for n, t in (value if isinstance(value, dict) else {"": value}).items():
                    assert torch.equal(torch.as_tensor(same[n]), torch.as_tensor(t)), (ranks, key, n)


def test_the_expected_cost_of_channels_is_held_to_the_budget_exactly() -> None:
    """Against a bisection over the cost, written out weight by weight in float64."""
    made, weights, _, _ = units("bottleneck", granularity="channel", density=0.5)
    gradient = {n: t - 0.8 for n, t in scores_of(weights).items()}
    found = channel_step(single(), made, {n: w.detach().clone() for n, w in weights.items()}, gradient)
    z, total = found["z"].double(), sum(w.numel() for w in weights.values())

    def cost(s: Tensor) -> float:
        return sum(float(mask_product(made, s, n, w.shape).sum()) for n, w in weights.items())

    low, high = 0.0, float(z.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost((z - middle).clamp(0, 1)) > 0.3 * total else (low, middle)
    assert found["v"] == pytest.approx(high, abs=1e-8)
    assert torch.allclose(found["projected"].double(), (z - high).clamp(0, 1), atol=1e-7)
    assert cost(found["projected"].double()) == pytest.approx(0.3 * total, rel=1e-6)
    assert sum(int(m.sum()) for m in found["mask"].values()) <= round(0.3 * total)
