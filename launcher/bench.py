"""ghostmask bench: run one benchmark, print its table, write its rows."""

from __future__ import annotations

from pathlib import Path

import torch

from ghostmask.benchmarks.registry import BENCHMARKS
from ghostmask.benchmarks.row import not_met, table, write_json
from ghostmask.benchmarks.timing import Bench, machine
from ghostmask.engine.cores import cores_per_rank
from ghostmask.engine.errors import InputError, output, say
from ghostmask.engine.registry import resolve
from ghostmask.engine.world import connect


def bench(name: str, *, device: str, quick: bool, file: Path | None, strict: bool = False) -> int:
    """Run benchmark `name` in this process (it starts others where it needs ranks); returns the exit code.

    device: as `train.device`; quick: sizes that take seconds, whose numbers mean nothing; file: gets the rows as JSON;
    strict: 1 where a row does not meet its bar, else 0.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise InputError(f"--json = {str(file)!r}: there is no folder {str(file.parent)!r}; make it")
    torch.set_num_threads(cores_per_rank())
    with connect(device) as world:
        rows = [machine(), *resolve(BENCHMARKS[name])(Bench(world, quick))]
    output(table(rows))
    if file is not None:
        write_json(rows, file)
    missed = not_met(rows) if strict else []
    if missed:
        say(f"bar not met: {'; '.join(missed)}")
    return 1 if missed else 0
