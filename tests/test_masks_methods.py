"""What every mask method in the registry must do: gradients, density, resume. New methods join by themselves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_reference import bounded, relaxed_mask
from memory_data import MemoryData
from memory_run import CONFIG, Outcome, complete, configured, memory_run
from torch import Tensor

from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.hooks import Hook
from ghostmask.engine.registry import resolve
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World, single
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.run import plan
from ghostmask.launcher.settings import settings_of
from ghostmask.masks.drawn import random_mask
from ghostmask.masks.elementwise import elementwise
from ghostmask.masks.mask_file import write_masks
from ghostmask.masks.masked import Masked
from ghostmask.masks.method import MaskMethod, Recipe
from ghostmask.masks.noisy import NoisyWeights
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.registry import METHODS
from ghostmask.masks.relaxed import RelaxedMask
from ghostmask.masks.scoring.allocation import layer_counts
from ghostmask.masks.scoring.topk import kept_count
from ghostmask.models.build import build_model
from ghostmask.models.config import TOST_PRESETS

SHORT = configured(
    CONFIG, model={"name": "digits_resnet"}, train={"epochs": 2}, finetune={"epochs": 1}, mask={"noises": 2}
)
"""V = 4 parts with batch norm; 8 steps of the main phase (lth: of each of 4 rounds), 4 of fine-tuning. A checkpoint
every 3 steps and at the end of epochs."""
DENSITY = 0.1
TOST = {**TOST_PRESETS["all"], "ghost_skip_fraction": 0.9, "swish_fraction": 0.9, "lrsi_steps": 2}


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mask.method=file reads: a random mask of the density that all methods are asked for."""
    weights = prunable_weights(build_model(SHORT.model, 4, MemoryData.image_shape, seed=3))
    counts = layer_counts([w.shape for w in weights.values()], DENSITY, "erk")
    masks = {n: random_mask(w, count, 1, n) for (n, w), count in zip(weights.items(), counts, strict=True)}
    path = tmp_path_factory.mktemp("file") / "mask.safetensors"
    write_masks(path, masks, {})
    return str(path)


def chosen(method: str, mask_file: str) -> RunConfig:
    """The configuration of a run with the method."""
    path = {"path": mask_file} if method == "file" else {}
    return configured(SHORT, mask={"method": method, **path})


def forms(name: str, mask_file: str, world: World) -> Iterator[tuple[str, Reparametrization, MaskMethod]]:
    """(phase, how the method makes its prunable weights there, method), under masks of half of the weights."""
    settings = chosen(name, mask_file).mask
    recipe = Recipe(OptimConfig(lr=0.1), FinetuneConfig(epochs=1), epochs=2, seed=3)
    net = build_model(SHORT.model, 4, MemoryData.image_shape, seed=3)
    method: MaskMethod = resolve(METHODS[name])(settings, net, recipe, world)
    for phase in plan(method, 4):
        method.found = {n: random_mask(w, w.numel() // 2, 5, n) for n, w in method.weights.items()}
        yield phase.name, method.reparametrization(phase), method


def state_of(form: Reparametrization, part: Slice, generator: torch.Generator) -> State:
    """A state in the middle of training: trained tensors are anywhere, probabilities also at their limits."""
    whole = {n: torch.randn(shape, generator=generator) for n, shape in part.layout.shapes.items()}
    state = form.start(part.cut(whole), part)
    for name in form.rules:
        if name in form.whole:
            state[name].copy_(torch.rand(state[name].shape, generator=generator))
            continue
        drawn = {n: torch.rand(shape, generator=generator) for n, shape in part.layout.shapes.items()}
        value = part.cut(drawn)
        if name == "probability":
            value = torch.where(value < 0.1, 0.0, torch.where(value > 0.9, 1.0, value))
        elif name == "weight":
            value = value * 2 - 1
        state[name].copy_(value)
    return state


def gradients_of(world: World, mask_file: str) -> dict[str, dict[str, Tensor]]:
    """ "method phase" -> the gradients of all trained state, whole, and of what they were made from."""
    found: dict[str, dict[str, Tensor]] = {}
    draw = Draw(3, 17, 1)
    for name in METHODS:
        for phase, form, method in forms(name, mask_file, world):
            shapes = {n: w.shape for n, w in method.weights.items()}
            part = Slice(Layout(shapes, world.size, 100_000 if world.size > 1 else 0, 2), world)
            generator = torch.Generator().manual_seed(0)
            state = state_of(form, part, generator)
            if isinstance(form, RelaxedMask):
                form.temperature = 0.6
            gradient = part.cut({n: torch.randn(shape, generator=generator) for n, shape in shapes.items()})
            got = form.gradients(gradient.clone(), state, part, draw)
            assert got.keys() == form.rules.keys(), name
            flat = {f"d {k}": t for k, t in got.items()} | state
            flat |= {"gradient": gradient, "theta": form.weights(state, part, draw)}
            same = {key for k in form.whole for key in (k, f"d {k}")}
            whole = {k: {k: t} if k in same else part.gathered(t) for k, t in flat.items()}
            found[f"{name} {phase}"] = {k: torch.cat([t.reshape(-1) for t in v.values()]) for k, v in whole.items()}
    return found


@pytest.fixture(scope="module")
def alone(mask_file: str) -> dict[str, dict[str, Tensor]]:
    return gradients_of(single(), mask_file)


def test_gradients_are_those_of_float64_autograd_through_the_weights(
    alone: dict[str, dict[str, Tensor]], mask_file: str
) -> None:
    assert len(alone) >= len(METHODS)
    for name in METHODS:
        for phase, form, method in forms(name, mask_file, single()):
            given = alone[f"{name} {phase}"]
            trained = {k: given[k].double().requires_grad_() for k in form.rules}
            state = {k: v.double() if v.is_floating_point() else v for k, v in given.items()} | trained
            if isinstance(form, RelaxedMask):
                theta = state["weight"] * relaxed_mask(state["probability"], 0, Draw(3, 17, 1), 0.6)
            else:
                part = Slice.even(method.weights, single())
                form.start(given["weight"].clone(), part)
                theta = form.weights(state, part, Draw(3, 17, 1))
            torch.testing.assert_close(given["theta"].double(), theta.detach(), rtol=1e-5, atol=1e-6)
            outputs, slopes = [theta], [given["gradient"].double()]
            if isinstance(form, NoisyWeights):
                outputs.append(form.penalty(state["weight"], form.seconds(state)))
                slopes.append(torch.full_like(theta, form.strength))
            wanted = torch.autograd.grad(outputs, list(trained.values()), slopes)
            expected = dict(zip(trained, wanted, strict=True))
            if "probability" in expected:
                expected["probability"] = bounded(expected["probability"], given["probability"].double())
            for key, slope in expected.items():
                assert torch.allclose(given[f"d {key}"].double(), slope, rtol=1e-4, atol=1e-5), (name, phase, key)


def test_gradients_and_weights_are_the_same_bits_on_two_ranks(
    alone: dict[str, dict[str, Tensor]], mask_file: str
) -> None:
    for rank in run_distributed(gradients_of, 2, mask_file):
        assert rank.keys() == alone.keys()
        for name, tensors in rank.items():
            different = [k for k, t in tensors.items() if not torch.equal(t, alone[name][k])]
            assert different == [], name


class Keep(Hook):
    """Remembers the trainer of the last phase."""

    trainer: Trainer | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.trainer = trainer


def delivered(world: World, folder: str, config: RunConfig) -> tuple[Outcome, list[str]]:
    """A finished run, and the names of the weights that are not what the state's evaluation weights say."""
    data, keep = MemoryData(world), Keep()
    run, saved = memory_run(world, Path(folder), config, data)
    run.hooks = (keep,)
    run.execute(saved)
    masks = {n: m.clone() for n, m in run.masks().items()}
    weights = {n: t.detach().clone() for n, t in run.net.state_dict().items()}
    assert keep.trainer is not None
    optimizer = keep.trainer.sharded.optimizer
    wrong = []
    for group, state, part in zip(optimizer.groups, optimizer.states, optimizer.slices, strict=True):
        values = part.gathered(group.reparametrization.evaluation_weights(state, part))
        wrong += [n for n, value in values.items() if not torch.equal(weights[n], value)]
    run.close()
    return Outcome(weights, masks, data.fed, 0), wrong


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, mask_file: str) -> Any:
    """method -> the outcomes of an uninterrupted run on 2 ranks, made once."""
    made: dict[str, Any] = {}

    def get(method: str) -> Any:
        if method not in made:
            config = chosen(method, mask_file)
            made[method] = run_distributed(delivered, 2, str(tmp_path_factory.mktemp(method)), config)
        return made[method]

    return get


@pytest.mark.parametrize("method", METHODS)
def test_ranks_end_with_the_same_network_at_exactly_the_density_asked_for(method: str, finished: Any) -> None:
    (outcome, wrong), (other, _) = finished(method)
    assert outcome.digest == other.digest
    assert wrong == [], "the network is not what the state says"
    prunable = sum(m.numel() for m in outcome.masks.values())
    if method == "dense":
        assert prunable == 0
        return
    layers = [m.numel() for m in outcome.masks.values()]
    layerwise = getattr(chosen(method, "any").mask, "constraint", "") == "layerwise"
    if settings_of(method).decided_by:
        assert 0 < outcome.kept < prunable
    else:
        assert outcome.kept == sum(kept_count(DENSITY, n) for n in (layers if layerwise else [prunable]))
    pruned = torch.cat([outcome.weights[n][~m] for n, m in outcome.masks.items()])
    kept = torch.cat([outcome.weights[n][m] for n, m in outcome.masks.items()])
    assert not pruned.any()
    assert int((kept == 0).sum()) < 0.01 * len(kept)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_in_the_middle_ends_bit_identical_on_the_same_and_on_another_number_of_ranks(
    method: str, finished: Any, mask_file: str, tmp_path: Path
) -> None:
    config = chosen(method, mask_file)
    killed(config, tmp_path / "2", 6)
    others = [4] if method == "probmask" else [1]
    if resolve(METHODS[method]).searches or method == "dense":  # what follows on a finder's mask is alike for all
        others.append(2)
    for ranks in others:
        if ranks != 2:
            shutil.copytree(tmp_path / "2", tmp_path / str(ranks))
    for ranks in others:
        outcomes = run_distributed(complete, ranks, str(tmp_path / str(ranks)), config)
        assert outcomes[0].resumed_at in (3, 4), "it started over, or from nowhere it should have"
        assert {o.digest for o in outcomes} == {finished(method)[0][0].digest}, ranks
        whole, resumed = fed([o for o, _ in finished(method)]), fed(outcomes)
        assert resumed == {step: seen for step, seen in whole.items() if step >= outcomes[0].resumed_at}


def killed(config: RunConfig, folder: Path, step: int) -> None:
    """Run on 2 ranks, which kill themselves after `step`."""
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_distributed(complete, 2, str(folder), config, step)


def fed(outcomes: list[Outcome]) -> dict[int, list[int]]:
    """Step -> the samples that all ranks together were fed. Finders and estimates see some of them too: set apart."""
    found: dict[int, list[int]] = {}
    for outcome in outcomes:
        for step, samples in dict(outcome.fed).items():
            found[step] = sorted({*found.get(step, []), *samples})
    return found


LATER = {
    # method or preset: (mask, tost, step of the kill, ranks that go on)
    "probmask in fine-tuning": ({"noises": 2}, {}, 11, 4),
    "magnitude in fine-tuning": ({"method": "magnitude"}, {}, 11, 1),
    "lth of powers in its third round": ({"method": "lth", "power": 2.0}, {}, 20, 4),
    "rigl between exchanges": ({"method": "rigl", "update_every": 3, "end_fraction": 1.0}, {}, 6, 4),
    "set among ghosts": ({"method": "set", "update_every": 3, "end_fraction": 1.0}, TOST, 6, 1),
    "acdc in its last dense phase": ({"method": "acdc"}, {}, 6, 4),
    "probmask among ghosts": ({"noises": 1}, TOST, 6, 1),
    "str among ghosts": ({"method": "str"}, TOST, 6, 4),
    "l0 of channels among ghosts": ({"method": "l0", "gates": "channel"}, TOST, 6, 1),
    "dense after ghosts": ({"method": "dense"}, {**TOST, "ghost_skip_fraction": 0.4}, 6, 4),
}


@pytest.mark.parametrize("name", LATER)
def test_a_run_killed_in_another_phase_or_among_ghosts_ends_bit_identical_on_other_ranks(
    name: str, tmp_path: Path
) -> None:
    mask, tost, step, ranks = LATER[name]
    config = configured(SHORT, mask=dict(mask), **({"tost": tost} if tost else {}))
    (whole, *_) = run_distributed(complete, 2, str(tmp_path / "whole"), config)
    killed(config, tmp_path / "killed", step)
    outcomes = run_distributed(complete, ranks, str(tmp_path / "killed"), config)
    assert step - 4 <= outcomes[0].resumed_at < step
    assert {o.digest for o in outcomes} == {whole.digest}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_masked_form_delivers_is_what_it_trains_with_where_its_mask_is_true(method: str, mask_file: str) -> None:
    for _, form, owner in forms(method, mask_file, single()):
        part = Slice.even(owner.weights, single())
        state = state_of(form, part, torch.Generator().manual_seed(1))
        if not isinstance(form, Masked):
            assert method in ("dense", "magnitude")
            continue
        mask = form.mask(state, part)
        assert mask.dtype == torch.bool
        trained = state["weight"] if form.noisy else form.weights(state, part, Draw(0, 0, 0))
        if isinstance(form, NoisyWeights):
            trained = elementwise(form.expected, state["weight"], form.seconds(state))
        assert torch.equal(form.evaluation_weights(state, part), torch.where(mask, trained, 0.0))
        if "density" in {field.name for field in fields(resolve(METHODS[method]).Settings)}:
            assert form.due(part) is not None, "nobody could check how many weights it keeps"
        assert 0 < int(mask.sum()) <= part.total
