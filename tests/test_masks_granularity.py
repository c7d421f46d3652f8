"""Are N:M blocks, kernels, channels and budgets of multiplications exact, equal on all ranks, and what they say?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from granular import masks_of, scores_of, settings, units
from torch import Tensor, nn

from ghostmask.engine.errors import InputError, RunStopped
from ghostmask.engine.sharding.neighbours import with_neighbours
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.granularity import units_of
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.scoring.topk import Budget, hashed, kept_count, largest
from ghostmask.masks.settings import n_of_m
from ghostmask.models.flops import uses_of

# Blocks


@pytest.mark.parametrize("granularity", ["2:4", "1:4", "3:5"])
@pytest.mark.parametrize("name", ["bottleneck", "depthwise"])
def test_of_every_block_of_input_channels_the_largest_stay(name: str, granularity: str) -> None:
    made, weights, _, _ = units(name, granularity=granularity)
    (kept, of) = n_of_m(granularity) or (0, 0)
    scores = scores_of(weights)
    masks = masks_of(made, scores, Budget(kept / of, units=made))
    for n, mask in masks.items():
        flat, own = mask.flatten(2) if mask.dim() > 2 else mask[..., None], scores[n].reshape(*mask.shape[:2], -1)
        for row in range(flat.shape[0]):
            for place in range(flat.shape[2]):
                for first in range(0, flat.shape[1], of):
                    block = own[row, first : first + of, place]
                    wanted = torch.zeros(len(block), dtype=torch.bool)
                    wanted[block.argsort(descending=True)[:kept]] = True
                    assert torch.equal(flat[row, first : first + of, place], wanted)


def test_blocks_fall_with_the_density_and_nothing_returns() -> None:
    made, weights, _, _ = units("bottleneck", granularity="2:4")
    scores, part = scores_of(weights), Slice.even(weights, single())
    own, kept = part.cut(scores), None
    inner = part.cut({n: torch.full(w.shape, w.shape[1] % 4 == 0) for n, w in weights.items()})
    for density, share in ((1.0, 1.0), (0.8, 1.0), (0.7, 0.75), (0.5, 0.5)):
        before = kept
        kept = largest(part, own, Budget(density, units=made), among=kept)
        assert float(kept[inner].double().mean()) == share
        assert before is None or not bool((kept & ~before).any())


# Kernels and multiplications


def expected_units(
    scores: dict[str, Tensor], lengths: dict[str, int], uses: dict[str, int], density: float, least: int, seed: int
) -> dict[str, Tensor]:
    """By sorting all units, in Python."""
    ranked, begin, costs_of_all = [], 0, 0
    whole = max(lengths.values()) > 1
    for n, given in scores.items():
        t = (given.double() / given.double().mean()).float() if whole else given
        rows = t.reshape(-1, lengths[n])
        costs_of_all += t.numel() * uses[n]
        layer = []
        for number, row in enumerate(rows.double().mean(1).float().tolist()):
            index = torch.tensor([begin + number * lengths[n]])
            layer.append((row, int(hashed(index, seed)), n, number, lengths[n] * uses[n]))
        layer.sort(reverse=True)
        ranked += [(place >= least, *entry) for place, entry in enumerate(layer)]
        begin += t.numel()
    ranked.sort(key=lambda entry: (entry[0], -entry[1], -entry[2]))
    left, masks = (
        kept_count(density, costs_of_all),
        {n: torch.zeros_like(t, dtype=torch.bool) for n, t in scores.items()},
    )
    for _, _, _, n, number, cost in ranked:
        if cost > left:
            break
        left -= cost
        masks[n].view(-1, lengths[n])[number] = True
    return masks


@pytest.mark.parametrize("least", [0, 2])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("granularity", "budget"), [("kernel", "weights"), ("kernel", "flops"), ("weight", "flops")])
def test_kernels_and_multiplications_are_the_longest_beginning_of_the_ranking_that_fits(
    granularity: str, budget: str, coarse: bool, least: int
) -> None:
    made, weights, net, shape = units("bottleneck", granularity=granularity, budget=budget)
    scores = scores_of(weights, coarse=coarse)
    lengths = {n: w.shape[2:].numel() if granularity == "kernel" else 1 for n, w in weights.items()}
    uses = uses_of(net, shape) if budget == "flops" else dict.fromkeys(weights, 1)
    for density in (0.15, 0.4, 1.0):
        masks = masks_of(made, scores, Budget(density, min_per_layer=least, seed=7, units=made))
        wanted = expected_units(scores, lengths, uses, density, least, 7)
        assert all(torch.equal(masks[n], wanted[n]) for n in weights), density
        spent = sum(int(m.sum()) * uses[n] for n, m in masks.items())
        total = sum(w.numel() * uses[n] for n, w in weights.items())
        dearest = max(lengths[n] * uses[n] for n in weights)
        assert 0 <= round(density * total) - spent < dearest


def test_layerwise_kernels_fill_every_layer() -> None:
    made, weights, _, _ = units("bottleneck", granularity="kernel", constraint="layerwise")
    masks = masks_of(made, scores_of(weights), Budget(0.2, "layerwise", units=made))
    for mask in masks.values():
        length = mask.shape[2:].numel()
        assert int(mask.sum()) == round(0.2 * mask.numel()) // length * length


# All of them


CASES: dict[str, dict[str, Any]] = {
    "2:4": {"granularity": "2:4"},
    "2:7": {"granularity": "2:7"},
    "kernel": {"granularity": "kernel", "density": 0.3, "min_per_layer": 3},
    "kernel layerwise": {"granularity": "kernel", "density": 0.3, "constraint": "layerwise"},
    "flops": {"budget": "flops", "density": 0.1},
    "channel": {"granularity": "channel", "density": 0.3},
    "channel flops": {"granularity": "channel", "density": 0.3, "budget": "flops", "min_per_layer": 1},
}


def all_masks(world: World, made: dict[str, Any], scores: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    found = {}
    for name, values in CASES.items():
        chosen = settings(**values)
        budget = Budget(chosen.density, chosen.constraint, chosen.min_per_layer, 3, made[name])
        for kind, own in (("coarse", {n: (3 * t).round() for n, t in scores.items()}), ("float64", scores)):
            typed = {n: t.double() if kind == "float64" else t for n, t in own.items()}
            found[f"{name} {kind}"] = list(masks_of(made[name], typed, budget, world).values())
    return found


def test_all_units_are_the_same_on_any_number_of_ranks() -> None:
    made = {name: units("bottleneck", **values)[0] for name, values in CASES.items()}
    scores = scores_of(units("bottleneck")[1])
    alone = all_masks(single(), made, scores)
    for ranks in (2, 4):
        for found in run_distributed(all_masks, ranks, made, scores):
            for name, masks in found.items():
                assert all(torch.equal(a, b) for a, b in zip(masks, alone[name], strict=True)), (name, ranks)


def neighbourhoods(world: World) -> Iterator[int]:
    shapes = {"a": torch.Size((7,)), "b": torch.Size((5, 3)), "c": torch.Size((1,)), "d": torch.Size((40,))}
    part = Slice(Layout(shapes, world.size, 20), world)
    values = part.indices().float()
    for reach in (0, 1, 4, 30):
        for run, wide, low in with_neighbours(part, values, reach):
            assert torch.equal(wide, torch.arange(low, low + len(wide)).float())
            bucket = next(b for b in part.layout.buckets if b.first <= run.first < b.first + b.numel)
            assert low == max(bucket.first, run.first - reach)
            assert low + len(wide) == min(bucket.first + bucket.numel, run.first + run.numel + reach)
            yield len(wide)


def all_neighbourhoods(world: World) -> int:
    return sum(neighbourhoods(world))


def test_neighbours_of_a_slice_are_those_of_the_group_also_where_ranks_hold_less_than_they_reach() -> None:
    for ranks in (1, 2, 4):
        assert sum(run_distributed(all_neighbourhoods, ranks)) >= 4 * 63


@pytest.mark.parametrize("name", CASES)
def test_a_nan_score_stops_the_run(name: str) -> None:
    made, weights, _, _ = units("bottleneck", **CASES[name])
    scores = scores_of(weights)
    scores["layer1.0.conv2.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(RunStopped, match=r"scores are (nan|not finite)"):
        masks_of(made, scores, Budget(0.5, units=made))


# What is refused


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"granularity": "4:2"}, "mask.granularity = '4:2' is not known"),
        ({"granularity": "channels"}, "did you mean 'channel'"),
        ({"granularity": "2:4", "density": 0.05}, "which keeps 0.5 of a block"),
        ({"granularity": "2:4", "constraint": "layerwise"}, "holds in every block"),
        ({"granularity": "2:4", "budget": "flops"}, "holds in every block"),
        ({"granularity": "2:4", "min_per_layer": 1}, "holds in every block"),
        ({"budget": "flops", "constraint": "layerwise"}, "every weight counts alike"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_what_fits(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings(**values)


def test_the_density_of_blocks_is_theirs() -> None:
    assert settings(granularity="1:4").density == 0.25
    assert settings(granularity="2:4", density=0.5).density == 0.5


class Opaque(nn.Module):
    """A network whose path depends on the values of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).amax((2, 3))
        out: Tensor = self.fc(x if bool(x.sum() > 0) else -x)
        return out


def test_a_network_that_cannot_be_followed_or_a_budget_without_room_is_refused_in_one_line() -> None:
    net = Opaque()
    with pytest.raises(InputError, match=r"mask.granularity = 'channel'.*cannot be followed.*use kernel") as refused:
        units_of(settings(granularity="channel"), net, prunable_weights(net), (3, 8, 8), dict)
    assert "\n" not in str(refused.value)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(InputError, match="must keep it"):
        units_of(settings(granularity="channel"), flat, prunable_weights(flat), (3, 2, 2), dict)
    with pytest.raises(InputError, match=r"mask.min_per_layer = 30 protects costs \d+"):
        units("resnet20", granularity="channel", density=0.01, min_per_layer=30)
    made, weights, _, _ = units("bottleneck", granularity="kernel")
    with pytest.raises(InputError, match="lower it or raise that"):
        masks_of(made, scores_of(weights), Budget(0.01, min_per_layer=30, units=made))
