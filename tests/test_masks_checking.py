"""Is a mask caught that differs between ranks, keeps another number of weights or no weight of a layer?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from memory_run import CONFIG, complete, configured
from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.launcher.config import RunConfig
from ghostmask.masks.checking import MaskWatch, fingerprints
from ghostmask.masks.masked import Masked
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.methods.gmp import GradualMagnitude, Shrinking
from ghostmask.masks.methods.probmask import ProbMask
from ghostmask.masks.one_shot import OneShot
from ghostmask.masks.power import powered
from ghostmask.masks.registry import METHODS
from ghostmask.masks.relaxed import RelaxedMask
from ghostmask.masks.scoring.topk import Budget, largest
from ghostmask.masks.settings import FromTrained, Protecting, Ranked, WithDensity

SHAPES = {"a": torch.Size([6, 5]), "b": torch.Size([40])}


def one_more(mask: Tensor) -> None:
    """Keep the first weight that is pruned."""
    mask[int((~mask).nonzero()[0])] = True


def swapped(mask: Tensor) -> None:
    """Keep one weight in another one's place."""
    kept = int(mask.nonzero()[0])
    one_more(mask)
    mask[kept] = False


class OneMore(Shrinking):
    """A schedule that keeps one weight more than its density allows, at its third decision."""

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        super().constrain(state, part, updates)
        if updates == 4 and part.world.rank == 0:
            one_more(state["mask"])


class Astray(Shrinking):
    """A schedule that decides otherwise on the second of the ranks that hold the same."""

    def constrain(self, state: State, part: Slice, updates: int) -> None:
        super().constrain(state, part, updates)
        if updates == 4 and dist.get_rank() == 1:
            swapped(state["mask"])


class Schedules(GradualMagnitude):
    """GMP under one of the above."""

    form: type[Shrinking] = OneMore

    def reparametrization(self, phase: Phase) -> Reparametrization:
        made: Any = super().reparametrization(phase)
        return self.form(made.rules["weight"], made.budget, made.first, made.last, made.every)


class AstraySchedules(Schedules):
    form = Astray


class AstrayGroup(RelaxedMask):
    """Probabilities whose mask is another one in the second noise group."""

    def mask(self, state: State, part: Slice) -> Tensor:
        mask = super().mask(state, part).clone()
        if dist.get_rank() == 1:
            swapped(mask)
        return mask


class AstrayProbMask(ProbMask):
    def reparametrization(self, phase: Phase) -> Reparametrization:
        made = super().reparametrization(phase)
        if isinstance(made, RelaxedMask):
            made.__class__ = AstrayGroup
        return made


class Forgetful(Masked):
    """As somebody's first method: says nothing of what it must keep, and keeps one more."""

    budget: Budget

    def mask(self, state: State, part: Slice) -> Tensor:
        mask = largest(part, state["weight"].abs(), self.budget)
        if part.world.rank == 0:
            one_more(mask)
        return mask

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        return torch.where(self.mask(state, part), state["weight"], 0.0)

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        return {"weight": gradient}


class ForgetfulMethod(MaskMethod):
    Settings = WithDensity

    def reparametrization(self, phase: Phase) -> Reparametrization:
        form = Forgetful({"weight": self.rule()})
        form.budget = Budget(self.settings.density)
        return form

    def leave(self, trainer: Any) -> None:
        """Forgets what it inherits."""


class FinderSettings(Protecting, FromTrained):
    """Of the finders below."""


class Finder(OneShot):
    """Finds one weight more than it may keep."""

    Settings = FinderSettings

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        part = Slice.even(self.weights, self.world)
        mask = largest(part, part.cut(self.weights).abs(), self.budget())
        self.spoil(mask)
        return {n: m.clone() for n, m in part.gathered(mask).items()}

    def spoil(self, mask: Tensor) -> None:
        if self.world.rank == 0:
            one_more(mask)


class AstrayFinder(Finder):
    """Finds another mask on the second rank."""

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        masks = super().find(data)
        if self.world.rank == 1:
            swapped(masks["net.0.weight" if "net.0.weight" in masks else next(iter(masks))].view(-1))
        return masks

    def spoil(self, mask: Tensor) -> None:
        """Nothing."""


class Unsettled(Finder):
    """Finds one weight more, and does not go through `settle`."""

    def begin(self, phase: Phase, data: DataPipeline, say: Any) -> None:
        self.found = self.find(data)


PLANTED: Mapping[str, tuple[type[MaskMethod], int, str]] = {
    # name: (method, ZeRO stage, what is said)
    "one more": (Schedules, 1, "the mask keeps not"),
    "astray at stage 0": (AstraySchedules, 0, r"the masks differ between ranks: \S+ \(\d+ weights here\)"),
    "astray in a noise group": (AstrayProbMask, 1, "the masks differ between ranks"),
    "forgetful": (ForgetfulMethod, 1, "the mask keeps not"),
    "finder": (Finder, 1, "the mask keeps not"),
    "astray finder": (AstrayFinder, 1, "the masks differ between ranks"),
    "unsettled finder": (Unsettled, 1, "the mask keeps not"),
}


def planted(name: str) -> RunConfig:
    """A run with a planted method, which this process's registry knows from now on."""
    method, stage, _ = PLANTED[name]
    METHODS[name] = f"{__name__}:{method.__name__}"
    noises = {"noises": 2} if method is AstrayProbMask else {}
    config = configured(CONFIG, mask={"method": name, **noises}, train={"zero_stage": stage, "epochs": 2})
    return configured(config, finetune={"epochs": 0})


def run_planted(world: World, name: str, folder: str) -> str:
    """What the run with a planted method ended with on this rank."""
    try:
        complete(world, folder, planted(name))
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_method_is_caught_on_every_rank(name: str, tmp_path: Path) -> None:
    for said in run_distributed(run_planted, 2, name, str(tmp_path)):
        assert re.match(PLANTED[name][2], said), said
        assert "please report this as a bug" in said


def decided_wrongly(world: World, folder: str) -> str:
    """What a run that makes its third decision wrongly, and reports nothing, ended with."""
    try:
        complete(world, folder, configured(planted("one more"), train={"log_every": 1000}))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_decision_is_checked_at_its_step_not_at_the_next_report(tmp_path: Path) -> None:
    (said,) = run_distributed(decided_wrongly, 1, str(tmp_path))
    assert said.startswith("the mask keeps not")
    assert "mask/density" not in (tmp_path / "metrics.jsonl").read_text()


def test_fingerprints_see_every_weight_and_do_not_depend_on_how_slices_are_cut() -> None:
    def whole(kept: list[int]) -> Tensor:
        part = Slice(Layout(SHAPES, 1), single())
        mask = torch.zeros(part.total, dtype=torch.bool)
        mask[kept] = True
        return fingerprints(part, mask)

    assert torch.equal(whole([3, 8, 40])[:, 0], torch.tensor([2, 1]))
    different = [whole(kept) for kept in ([3, 8, 40], [4, 7, 40], [3, 8, 41], [2, 9, 40], [3, 40, 41])]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    parts = [Slice(Layout(SHAPES, 3, 20), World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    mask = torch.rand(70, generator=torch.Generator().manual_seed(1)) < 0.4
    alone = fingerprints(Slice(Layout(SHAPES, 1), single()), mask)
    assert torch.equal(sum(fingerprints(part, mask[part.indices()]) for part in parts), alone)  # type: ignore[arg-type]


def test_counts_of_each_layer_are_checked_one_by_one() -> None:
    part, watch = Slice(Layout(SHAPES, 1), single()), MaskWatch(None, single())
    mask = torch.arange(70) % 10 == 0
    assert watch.check(part, mask, [3, 4], print) == [3, 4]
    assert watch.check(part, mask, [7], print) == [3, 4]
    assert watch.check(part, mask, None, print) == [3, 4]
    with pytest.raises(RuntimeError, match=r"keeps another number of weights than it must: a 3 for 4, b 4 for 3;"):
        watch.check(part, mask, [4, 3], print)
    with pytest.raises(RuntimeError, match=r"the mask keeps not 8, but: 7 weights;"):
        watch.check(part, mask, [8], print)


def test_lost_layers_are_told_once_per_change_with_the_setting_that_protects_them() -> None:
    part, said = Slice(Layout(SHAPES, 1), single()), list[str]()
    empty = torch.zeros(70, dtype=torch.bool)
    only_a, both = empty.clone(), empty.clone()
    only_a[0] = both[0] = both[50] = True
    for settings, advice in [
        (Protecting(), "mask.min_per_layer=1 keeps some"),
        (Ranked(), "mask.constraint=layerwise keeps some of each"),
        (WithDensity(), "mask.dense_layers leaves them as they are"),
    ]:
        watch = MaskWatch(settings, single())
        said.clear()
        for mask in (both, only_a, only_a, empty, both, only_a):
            watch.check(part, mask, None, said.append)
        one = f"warning: 1 of 2 layers have no weight left: b; {advice}"
        assert said == [one, one.replace("1 of 2", "2 of 2").replace(": b;", ": a, b;"), one]


def lines_of(world: World, folder: str) -> list[str]:
    """What a run that loses layers prints."""
    config = configured(CONFIG, mask={"method": "gmp", "density": 1e-4}, finetune={"epochs": 0})
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        complete(world, folder, config)
    return (out.getvalue() + err.getvalue()).splitlines()


def test_a_run_tells_of_lost_layers_once_per_change(tmp_path: Path) -> None:
    (lines,) = run_distributed(lines_of, 1, str(tmp_path))
    lost = [line for line in lines if "no weight left" in line]
    assert 1 <= len(lost) == len(set(lost)) <= 3
    assert sum("mask: density 0.0001" in line for line in lines) == 1


def test_a_mask_around_another_form_is_held_to_what_that_one_must_keep() -> None:
    part = Slice(Layout(SHAPES, 1), single())
    form = powered(Shrinking(Sgd(), Budget(0.5), 0, 8, 2), 2.0)
    assert isinstance(form, Masked)
    form.schedule(8)
    assert form.due(part) == [35]
    assert [n for n in range(1, 10) if form.decides(n)] == [2, 4, 6, 8]
