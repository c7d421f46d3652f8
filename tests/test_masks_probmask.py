"""ProbMask: its schedules and constraint, every final mask, and what it says."""

from __future__ import annotations

import itertools
import json
import re
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, configured, memory_run
from torch import Tensor
from torch.func import functional_call

from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.hooks import Hook
from ghostmask.engine.progress import Progress
from ghostmask.engine.sharding.reparametrization import Draw
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World, single
from ghostmask.launcher.run import plan
from ghostmask.launcher.settings import settings_of
from ghostmask.masks.masked import PRUNABLE
from ghostmask.masks.method import Recipe
from ghostmask.masks.methods.probmask import ProbMask
from ghostmask.masks.relaxed import RelaxedMask
from ghostmask.masks.report import layer_histograms
from ghostmask.masks.schedules import probability_rate, suggested_rate
from ghostmask.masks.scoring.topk import kept_count
from ghostmask.models.build import build_model

SEARCH = configured(
    CONFIG, train={"epochs": 4}, finetune={"epochs": 0}, mask={"samples": 1},
    checkpoint={"every_steps": 0, "every_epochs": 9, "asynchronous": False},
)  # fmt: skip
"""16 steps of search of a network without batch norm."""
CANDIDATES = 4


def relaxed(epochs: int, **settings: Any) -> tuple[RelaxedMask, int]:
    """The reparametrization of a search of `epochs` epochs of 5 steps."""
    cls = settings_of("probmask")
    recipe = Recipe(OptimConfig(lr=0.1), FinetuneConfig(), epochs, seed=0)
    net = build_model(SEARCH.model, 4, MemoryData.image_shape, seed=3)
    method = ProbMask(cls(**settings), net, recipe, single())
    form = method.reparametrization(plan(method, 5)[0])
    assert isinstance(form, RelaxedMask)
    return form, 5 * epochs


def test_the_temperature_falls_from_epoch_to_epoch_and_is_temperature_end_in_the_last() -> None:
    form, steps = relaxed(7, temperature_end=0.04)
    seen = []
    for updates in range(steps):
        form.schedule(updates)
        seen.append(form.temperature)
    assert seen[-5:] == [0.04] * 5
    assert seen[0] == pytest.approx(0.96 * 6 / 7 + 0.04)
    assert len(set(seen)) == 7
    assert seen == sorted(seen, reverse=True)
    form.schedule(steps)  # after the last update: what is delivered is drawn as the last step's
    assert form.temperature == 0.04


def test_the_density_begins_and_ends_to_fall_at_whole_epochs() -> None:
    form, _ = relaxed(10, density=0.2, start_fraction=0.26, end_fraction=0.69)
    assert (form.search.start, form.search.end) == (2, 6)
    of_epochs = [{form.search.density_at(5 * epoch + step) for step in range(5)} for epoch in range(10)]
    assert all(len(values) == 1 for values in of_epochs), "it changed within an epoch"
    falling = [0.2 + 0.8 * (1 - x / 4) ** 3 for x in (0, 1, 2, 3)]
    assert [values.pop() for values in of_epochs] == pytest.approx([1.0, 1.0, *falling, 0.2, 0.2, 0.2, 0.2])
    assert form.rates["probability"] == pytest.approx(probability_rate(10 * 5) / 0.1)


def test_a_rate_that_is_given_goes_before_the_derived_one() -> None:
    form, _ = relaxed(10, lr=6e-3)
    assert form.rates["probability"] == pytest.approx(6e-3 / 0.1)


class Watch(Hook):
    """(threshold, sum of all probabilities, budget) after every step; the network's and the state's types."""

    def __init__(self) -> None:
        self.sums: list[tuple[float, float, float]] = []
        self.types: dict[str, set[torch.dtype]] = {}
        self.state: dict[str, Tensor] = {}
        self.trainer: Trainer | None = None

    def on_step_end(self, trainer: Trainer) -> None:
        group, state, part = trainer.sharded.optimizer.group(PRUNABLE)
        form = group.reparametrization
        if not isinstance(form, RelaxedMask):
            return
        self.trainer = trainer
        budget = form.search.density_at(trainer.num_updates - 1) * part.total
        self.sums.append((float(form.threshold), float(part.sum(state["probability"])), budget))
        every = [t for s in trainer.sharded.optimizer.states for t in s.values()]
        kinds = {"state": every, PRUNABLE: group.parameters.values()}
        kinds["other"] = [p for g in trainer.sharded.optimizer.groups[1:] for p in g.parameters.values()]
        for name, tensors in kinds.items():
            self.types.setdefault(name, set()).update(t.dtype for t in tensors)


def searched(world: World, folder: str, config: Any) -> dict[str, Any]:
    """Run the search and hand back what it learned and said."""
    run, saved = memory_run(world, Path(folder), config)
    start = {n: p.detach().clone() for n, p in run.net.named_parameters()}
    watch = Watch()
    run.hooks = (*run.hooks, watch)
    with redirect_stderr(StringIO()) as said:
        run.reporter.progress = Progress(world, 1)
        run.execute(saved)
    assert watch.trainer is not None
    group, state, part = watch.trainer.sharded.optimizer.group(PRUNABLE)
    form = group.reparametrization
    assert isinstance(form, RelaxedMask)
    result = {
        "s": part.gathered(state["probability"]), "w": part.gathered(state["weight"]), "sums": watch.sums,
        "masks": {n: m.clone() for n, m in run.masks().items()}, "types": watch.types, "said": said.getvalue(),
        "net": {n: p.detach().clone() for n, p in run.net.named_parameters()}, "start": start,
        "candidates": [part.gathered(form.sampled(state, part, i)) for i in range(CANDIDATES)],
    }  # fmt: skip
    run.close()
    return result


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A search on 2 ranks."""
    folder = tmp_path_factory.mktemp("usual")
    return folder, run_distributed(searched, 2, str(folder), SEARCH)


def test_the_probabilities_leave_one_and_meet_the_budget_exactly(usual: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = usual
    every = flat(first["s"])
    assert torch.equal(every, flat(second["s"]))
    assert float(every.min()) >= 0
    assert float(every.max()) <= 1
    assert len(every.unique()) > 1000, "the probabilities moved in lockstep: no gradient reached them"
    binding = [(total, budget) for threshold, total, budget in first["sums"] if threshold > 0]
    assert len(binding) >= 3
    assert all(abs(total - budget) <= 1e-3 for total, budget in binding), binding
    assert all(total <= budget + 1e-3 for _, total, budget in first["sums"])


def test_the_final_mask_is_the_most_probable_weights_and_the_network_holds_them(
    usual: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, (result, _) = usual
    s, mask = flat(result["s"]), flat(result["masks"])
    assert int(mask.sum()) == kept_count(0.1, len(mask))
    assert float(s[mask].min()) >= float(s[~mask].max())
    for name, kept in result["masks"].items():
        assert torch.equal(result["net"][name], torch.where(kept, result["w"][name], 0.0))


def test_schedules_rates_norms_and_the_share_of_the_limits_are_logged(
    usual: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, (result, _) = usual
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 16
    for line in steps:
        assert 0 < line["gradient/clip_factor"] <= 1
        joint = sum(line[f"gradient/prunable.{n}"] ** 2 for n in ("weight", "probability"))
        assert line["gradient/clip_factor"] == pytest.approx(min(1.0, 3.0 / joint**0.5), rel=1e-5)
        assert line["lr/prunable.probability"] == pytest.approx(line["lr/prunable.weight"] * 0.03 / 0.02)
        assert 0 <= line["gradient/prunable.probability_limit_share"] <= 1
        assert 0 <= line["mask/decided_fraction"] <= 1
    assert [line["mask/density"] * len(flat(result["s"])) for line in steps] == pytest.approx(
        [total for _, total, _ in result["sums"]]
    )
    # A line speaks of the state after its update, and of what the next one draws with.
    temperatures = [line["mask/temperature"] for line in steps]
    assert temperatures[:3] == pytest.approx([0.97 * 3 / 4 + 0.03] * 3)
    assert temperatures[-4:] == [0.03] * 4
    assert steps[-1]["mask/density_target"] == pytest.approx(0.1)
    (epoch,) = [line for line in lines if line["step"] == 16 and "eval/loss" in line]
    kept = {n: float(s.double().mean()) for n, s in result["s"].items()}
    assert {n: epoch[f"density/{n}"] for n in kept} == pytest.approx(kept, rel=1e-6)
    assert len(re.findall(r"accuracy \S+ density \S+ images/s", result["said"])) == 16


def test_the_share_of_the_limits_is_that_of_the_squared_gradient() -> None:
    form, _ = relaxed(3)
    form.watching, form.temperature = True, 0.7
    part = Slice.even({"w": torch.zeros(400)}, single())
    drawn = torch.rand(400, generator=torch.Generator().manual_seed(0))
    state = {"weight": torch.ones(400), "probability": torch.where(drawn < 0.2, 1.0, drawn)}
    found = form.gradients(torch.ones(400), state, part, Draw(0, 0, 0))
    squares = found["probability"].double().square()
    assert form.limit_share is not None
    share = float(squares[state["probability"] >= 1].sum() / squares.sum())
    assert float(form.limit_share) == pytest.approx(share, rel=1e-5)


def test_a_search_that_ends_with_few_decided_probabilities_says_so_with_a_rate(
    usual: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, (result, other) = usual
    decided = float(((flat(result["s"]) < 0.01) | (flat(result["s"]) > 0.99)).double().mean())
    assert decided < 0.8
    text = (
        rf"warning: only {decided:.0%} of the probabilities are within 0\.01 of 0 or 1 after 16 steps; "
        rf"mask\.lr = 0\.03 is too small for so few: try mask\.lr={suggested_rate(0.03, 16):.2g}, or more "
    )
    assert len(re.findall(text, result["said"])) == 1
    assert "warning" not in other["said"]


def counted(world: World) -> dict[str, Any]:
    shapes = {"a": torch.Size((70,)), "b": torch.Size((3, 50)), "c": torch.Size((1,))}
    generator = torch.Generator().manual_seed(0)
    whole = {n: torch.rand(shape, generator=generator) for n, shape in shapes.items()}
    whole["a"][:9], whole["a"][9:20] = 0.0, 1.0
    part = Slice(Layout(shapes, world.size, 60 if world.size > 1 else 0), world)
    found = layer_histograms(part.cut(whole), part)
    for name, c in found.items():
        edges = [0.0, *c.limits]
        inside = [int(((whole[name] >= a) & (whole[name] < b)).sum()) for a, b in itertools.pairwise(edges)]
        inside[-1] += int((whole[name] == 1).sum())
        assert c.counts == inside, name
        assert c.total == pytest.approx(float(whole[name].double().sum()), rel=1e-6)
        assert c.squares == pytest.approx(float(whole[name].double().square().sum()), rel=1e-6)
    return {n: c.counts for n, c in found.items()}


def test_the_probabilities_of_every_layer_are_counted_over_all_ranks() -> None:
    assert run_distributed(counted, 3) == [counted(single())] * 3


def test_the_suggested_rate_rises_as_steps_get_fewer_and_is_higher_than_the_present_one() -> None:
    assert suggested_rate(6e-3, 690) == pytest.approx(0.0594, rel=1e-2)
    assert suggested_rate(6e-3, 58_800) == 12e-3
    assert suggested_rate(0.5, 10**6) == 1.0


def test_a_search_that_keeps_everything_is_decided_and_gives_no_warning(tmp_path: Path) -> None:
    config = configured(SEARCH, train={"epochs": 1}, mask={"density": 1.0, "lr": 1e-9})
    (result,) = run_distributed(searched, 1, str(tmp_path), config)
    assert "of the probabilities" not in result["said"]
    assert bool(flat(result["masks"]).all())


def test_layers_that_lost_everything_are_named(tmp_path: Path) -> None:
    config = configured(SEARCH, mask={"density": 1e-5})
    (result, other) = run_distributed(searched, 2, str(tmp_path), config)
    empty = [n for n, m in result["masks"].items() if not m.any()]
    assert empty
    named = f"warning: {len(empty)} of {len(result['masks'])} layers have no weight left: {', '.join(empty)}; mask."
    assert named in result["said"]
    assert "layers have no weight left" not in other["said"]


def test_a_search_that_ends_early_is_held_to_the_final_density_and_ties_go_by_lot_not_by_layer(tmp_path: Path) -> None:
    """The density never falls and the rate moves nothing: all probabilities are equal when the mask is cut."""
    mask = {"lr": 1e-12, "density": 0.2, "start_fraction": 0.5, "end_fraction": 1.0}
    early = configured(SEARCH, train={"epochs": 2}, mask=mask)
    (result, _) = run_distributed(searched, 2, str(tmp_path / "2"), early)
    assert float(flat(result["s"]).double().sum()) == pytest.approx(0.2 * len(flat(result["s"])), abs=1e-3)
    assert result["sums"][-1][1] == len(flat(result["s"]))
    assert int(flat(result["masks"]).sum()) == kept_count(0.2, len(flat(result["s"])))
    for name, mask in result["masks"].items():
        deviation = (0.2 * 0.8 / mask.numel()) ** 0.5
        assert abs(float(mask.double().mean()) - 0.2) < 5 * deviation, name
    (alone,) = run_distributed(searched, 1, str(tmp_path / "1"), early)
    assert torch.equal(flat(alone["masks"]), flat(result["masks"]))
    (other,) = run_distributed(searched, 1, str(tmp_path / "seed"), replace(early, seed=4))
    share = float((flat(other["masks"]) & flat(alone["masks"])).sum() / flat(alone["masks"]).sum())
    assert share < 0.5, "another seed chose the same weights"


def test_the_layerwise_constraint_holds_in_every_layer(tmp_path: Path) -> None:
    config = configured(SEARCH, mask={"constraint": "layerwise"})
    (result, _) = run_distributed(searched, 2, str(tmp_path), config)
    for name, s in result["s"].items():
        assert 0.9 * 0.1 * s.numel() <= float(s.double().sum()) <= 0.1 * s.numel() + 1e-3, name
        assert int(result["masks"][name].sum()) == kept_count(0.1, s.numel()), name
        mask = result["masks"][name]
        assert float(s[mask].min()) >= float(s[~mask].max()), name


def test_a_supermask_trains_probabilities_and_nothing_else(tmp_path: Path) -> None:
    config = configured(SEARCH, mask={"train_weights": False}, finetune={"epochs": 3})
    (result, _) = run_distributed(searched, 2, str(tmp_path), config)
    assert len(flat(result["s"]).unique()) > 1000
    for name, start in result["start"].items():
        kept = result["masks"].get(name, torch.ones_like(start, dtype=torch.bool))
        assert torch.equal(result["net"][name], torch.where(kept, start, 0.0)), name
    mask = flat(result["masks"])
    assert int(mask.sum()) == kept_count(0.1, len(mask))
    assert len(result["sums"]) == 16, "a supermask was fine-tuned"


@pytest.mark.parametrize("final", ["sample", "best_of"])
def test_sampled_final_masks_are_equal_on_all_ranks_and_near_the_density(final: str, tmp_path: Path) -> None:
    candidates = {"candidates": 3} if final == "best_of" else {}
    config = configured(SEARCH, mask={"final": final, **candidates})
    first, second = run_distributed(searched, 2, str(tmp_path), config)
    mask, s = flat(first["masks"]), flat(first["s"]).double()
    assert torch.equal(mask, flat(second["masks"]))
    deviation = float((s * (1 - s)).sum()) ** 0.5
    assert abs(int(mask.sum()) - float(s.sum())) <= 4 * deviation + 1
    assert not bool(mask[s == 0].any())
    assert bool(mask[s == 1].all())
    top = torch.zeros_like(mask)
    top[s.argsort(descending=True)[: int(mask.sum())]] = True
    assert not torch.equal(mask, top), "it was not sampled"


def accuracy(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
    """Of conv4 under a mask, on the training images."""
    net, data = build_model(SEARCH.model, 4, MemoryData.image_shape, seed=3), MemoryData(single())
    batch = [torch.cat(parts) for parts in zip(*data.train(0), strict=True)]
    logits = functional_call(net, {n: torch.where(masks[n], w, 0.0) for n, w in weights.items()}, (batch[0],))
    return float((logits.argmax(1) == batch[1]).double().mean())


def test_sample_takes_the_first_candidate_and_best_of_the_most_accurate(tmp_path: Path) -> None:
    sparse = configured(SEARCH, mask={"density": 0.03, "final": "best_of", "candidates": CANDIDATES})
    (best,) = run_distributed(searched, 1, str(tmp_path / "best"), sparse)
    found = [accuracy(best["w"], candidate) for candidate in best["candidates"]]
    assert len(set(found)) > 1, "there was nothing to choose"
    chosen = [torch.equal(flat(best["masks"]), flat(candidate)) for candidate in best["candidates"]]
    assert chosen.index(True) == found.index(max(found))
    (first,) = run_distributed(searched, 1, str(tmp_path / "sample"), configured(SEARCH, mask={"final": "sample"}))
    assert torch.equal(flat(first["masks"]), flat(first["candidates"][0]))


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_weights_travel_while_the_state_stays_float32_and_what_is_delivered_was_not_rounded(
    stage: int, tmp_path: Path
) -> None:
    config = configured(SEARCH, model={"name": "digits_resnet"}, train={"precision": "bf16", "zero_stage": stage})
    (result, other) = run_distributed(searched, 2, str(tmp_path), config)
    assert result["types"] == {"state": {torch.float32}, PRUNABLE: {torch.bfloat16}, "other": {torch.float32}}
    assert len(flat(result["s"]).unique()) > 1000
    assert torch.equal(flat(result["net"]), flat(other["net"]))
    assert all(p.dtype == torch.float32 for p in result["net"].values())
    for name, kept in result["masks"].items():
        assert torch.equal(result["net"][name], torch.where(kept, result["w"][name], 0.0)), name
    every = flat(result["w"])
    assert not torch.equal(every, every.bfloat16().float()), "the state was rounded"


def test_at_stage_0_bf16_is_autocast_alone(tmp_path: Path) -> None:
    config = configured(SEARCH, train={"precision": "bf16", "zero_stage": 0, "epochs": 1})
    (result,) = run_distributed(searched, 1, str(tmp_path), config)
    assert result["types"][PRUNABLE] == {torch.float32}
