"""ghostmask bench: run one benchmark, print its table, write its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ghostmask.benchmarks.registry import BENCHMARKS
from ghostmask.benchmarks.row import not_met, table, write_json
from ghostmask.benchmarks.timing import Bench, machine, scratch
from ghostmask.engine.cores import cores_per_rank
from ghostmask.engine.errors import output, say
from ghostmask.engine.registry import resolve
from ghostmask.engine.world import World, connect
from ghostmask.launcher.locate import writing_to

if TYPE_CHECKING:
    from ghostmask.benchmarks.export import Exports


def bench(
    name: str, *, device: str, quick: bool, file: Path | None, strict: bool = False, run: Path | None = None
) -> int:
    """Run benchmark `name` in this process (it starts others where it needs ranks); returns the exit code.

    device: as `train.device`; quick: sizes that take seconds, whose numbers mean nothing; file: gets the rows as JSON;
    strict: 1 where a row does not meet its bar, else 0. run: whose export benchmark "export" looks at.
    """
    torch.set_num_threads(cores_per_rank())
    with connect(device) as world, _exports(run, world) as exports:
        world.pulse.enter(f"benchmark {name}")
        rows = [machine(), *resolve(BENCHMARKS[name])(Bench(world, quick, exports))]
    output(table(rows))
    if file is not None:
        with writing_to("--json", file) as writing:
            write_json(rows, writing)
    missed = not_met(rows) if strict else []
    if missed:
        say(f"bar not met: {'; '.join(missed)}")
    return 1 if missed else 0


@contextmanager
def _exports(run: Path | None, world: World) -> Iterator[Exports | None]:
    """All formats of the run's network, in a folder that is gone at the end."""
    if run is None:
        yield None
        return
    from ghostmask.launcher.exporting.convert import exported_folder
    from ghostmask.launcher.exporting.exported import read_exported
    from ghostmask.launcher.exporting.forms import write_forms

    world.pulse.enter(f"reading the network of {run}")
    exported = read_exported(exported_folder(run))
    with scratch() as folder:
        yield write_forms(exported, folder, world)
