"""ghostmask methods-table: what does every mask method reach at several densities, in the same number of epochs?

That number is train.epochs + finetune.epochs of a configuration. A method that fine-tunes is trained as it says; others
train for all of it; one that prunes a trained network gets one, dense, of train.epochs. (lth trains as long in each of
its rounds: the table says how many epochs a cell took.) Seed by seed, so that a table that is cut off is one of fewer
seeds; what is trained and what is only read: launcher.cells.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from ghostmask.engine.errors import InputError, bad_value
from ghostmask.launcher.cells import PlannedRun, beside_others, merged, planned, stop_if_failed, train_missing
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.methods import method_of
from ghostmask.launcher.methods import methods as all_methods
from ghostmask.launcher.settings import load_config, settings_of
from ghostmask.launcher.table import Cell, show_lines

Own = Mapping[tuple[str, str], Sequence[str]]
"""(method, density, or "" for all of them) -> its own settings."""


def methods_table(
    name: str, settings: Sequence[str], *, own: Sequence[str], methods: Sequence[str] | None, densities: Sequence[str],
    seeds: int, folder: Path, jobs: int = 1, only_print: bool = False, file: Path | None = None,
) -> int:  # fmt: skip
    """Run what is missing, `jobs` at a time, unless only_print; print the table, and write it to `file` as CSV; returns
    0.

    name: a configuration without settings that some method does not read; settings: key=value of every run; own:
    METHOD[@DENSITY]:key=value. A method without mask.density is run at the densities that `own` has settings for.
    Raises InputError before the first run for what is wrong with any of them, RunStopped at the end where runs failed.
    """
    given = _own(own)
    chosen = list(methods or [known for known in all_methods() if known == "dense" or _has(known, "density")])
    settings = beside_others(settings, jobs)
    plans: list[tuple[tuple[str, str], PlannedRun]] = []
    for seed in range(seeds):
        for density, method in _cells(chosen, densities, given):
            table = _Table(name, [*settings, f"seed={seed}"], folder, seed)
            extra = [*given.get((method, ""), ()), *given.get((method, density), ())]
            plans.append(((method, density), table.cell(method, density, extra)))
    failed = {} if only_print else train_missing([run for _, run in plans], jobs)
    cells = [Cell(shown, run.folder, run.needs.folder if run.needs else None) for shown, run in plans]
    show_lines(["method", "target"], cells, file, failed)
    stop_if_failed(failed)
    return 0


class _Table:
    """The runs of one seed."""

    def __init__(self, name: str, settings: list[str], folder: Path, seed: int) -> None:
        self.name, self.settings, self.folder, self.seed = name, settings, folder, seed
        self.config = load_config(name, settings)

    def cell(self, method: str, density: str, extra: Sequence[str]) -> PlannedRun:
        """The run of a method at a density."""
        cls = method_of(method, "--methods")
        first, last = self.config.train.epochs, self.config.finetune.epochs
        own = [f"mask.method={method}", f"mask.density={density if _has(method, 'density') else 1}"]
        needs = self._trained() if cls.prunes_trained else None
        if needs:
            own += [*_fine_tuned(self.config), f"mask.path={needs.config.run}", f"train.epochs={last}"]
        elif not cls.finetunes:
            own += [f"train.epochs={first + last}"]
        own += [] if cls.finetunes else ["finetune.epochs=0"]
        return self._planned("-".join(filter(None, (method, density))), [*own, *extra], needs)

    def _trained(self) -> PlannedRun:
        return self._planned("trained", ["mask.method=dense", "mask.density=1", "finetune.epochs=0"], None)

    def _planned(self, name: str, own: Sequence[str], needs: PlannedRun | None) -> PlannedRun:
        run = f"run={os.path.join(self.folder, f'{name}-seed{self.seed}')}"
        masked = "mask.method=dense" not in own  # which reads nothing of what is said of masks
        settings = [text for text in self.settings if masked or not text.startswith("mask.")]
        return planned(self.name, merged(settings, own, [run]), needs)


def _fine_tuned(config: RunConfig) -> list[str]:
    """The settings of a main phase that trains as fine-tuning does."""
    tuned = config.finetune
    return [f"optim.lr={tuned.lr}", f"optim.schedule={tuned.schedule}", "optim.warmup=0ep"]


def _cells(chosen: Sequence[str], densities: Sequence[str], own: Own) -> list[tuple[str, str]]:
    """(density, method) of one seed, in their order: dense first."""
    whole = [("", method) for method in chosen if method == "dense"]
    told = [method for method in chosen if _has(method, "density")]
    cells = [*whole, *itertools.product(densities, told)]
    for method in chosen:
        if method in told or method == "dense":
            continue
        reached = [density for other, density in own if other == method and density]
        if not reached:
            key = settings_of(method).decided_by or "KEY"
            raise InputError(
                f"--methods {method}: its density is no setting; say what it is to be run with at each density, such "
                f"as: --with {method}@{densities[0]}:{key}=VALUE (ghostmask find-density finds it)"
            )
        cells += [(density, method) for density in reached]
    return cells


def _has(method: str, setting: str) -> bool:
    method_of(method, "--methods")
    return setting in {field.name for field in fields(settings_of(method))}


def _own(texts: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    own: dict[tuple[str, str], list[str]] = {}
    for text in texts:
        place, colon, setting = text.partition(":")
        method, _, density = place.partition("@")
        if not colon or "=" not in setting:
            raise bad_value("--with", text, "give METHOD:key=value or METHOD@DENSITY:key=value")
        method_of(method, "--with")
        own.setdefault((method, density), []).append(setting)
    return own
