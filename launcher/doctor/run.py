"""Which checks does `ghostmask doctor` make, in which order, and what is its exit code?"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import torch

from ghostmask.engine.agree import on_main
from ghostmask.engine.errors import EXIT_INPUT, InputError, RunStopped, output
from ghostmask.engine.launch import Launch, read_launch
from ghostmask.engine.ranks import join
from ghostmask.engine.world import World, connect
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.doctor import disk, machine, reach, speed
from ghostmask.launcher.doctor.finding import Check, Finding, failed, worst
from ghostmask.launcher.doctor.patient import Patient
from ghostmask.launcher.run import Shares, settle
from ghostmask.launcher.settings import run_folder

CHECKS = (
    Check("ranks", reach.reach, together=True),
    Check("clocks", reach.clocks, together=True),
    Check("software", machine.software, together=True),
    Check("code", machine.code, together=True),
    Check("settings", machine.settings, together=True),
    Check("devices", machine.devices, together=True),
    Check("folder", disk.folder),
    Check("data", speed.data),
    Check("same data", speed.same_data, needs=("data",), together=True),
    Check("network", speed.network, needs=("same data",)),
    Check("step", speed.step, needs=("network", "folder", "devices", "settings", "code"), together=True),
    Check("loader", speed.loader, needs=("step",)),
    Check("disk", disk.disk, needs=("step",), together=True),
    Check("checkpoint", disk.checkpoint, needs=("disk",), together=True),
    Check("estimate", speed.estimate, needs=("step",), together=True),
)
TIMEOUT_MINUTES = 0.5
"""As train.timeout_minutes: what hangs in a check ends the command after three minutes, and is named."""


def doctor(config: RunConfig) -> int:
    """Collective: print one line per check on rank 0; returns 0, or EXIT_INPUT where a check fails."""
    return look_at(config, CHECKS, "doctor")


def look_at(
    config: RunConfig, checks: Sequence[Check], name: str, then: Callable[[Patient], None] = lambda patient: None
) -> int:
    """Collective: make the checks, print one line of each and, after `then`, their count; returns the exit code.

    Nothing of the run is written but a scratch folder on its disk, which is removed.
    """
    start, launch = perf_counter(), read_launch()
    reach.meet(launch)
    with connect(config.train.device, TIMEOUT_MINUTES) as world:
        config = settle(config, world)
        scratch = on_main(world, lambda: scratch_beside(run_folder(config)))
        patient = Patient(config, launch, world, scratch.parent, scratch, Shares.of(config, world))
        try:
            levels = examine(patient, checks)
            then(patient)
            patient.close()
        finally:
            if world.is_main:
                shutil.rmtree(scratch, ignore_errors=True)
        world.barrier()
    counts = {level: levels.count(level) for level in ("fail", "warn")}
    if world.is_main:
        verdict = f"{counts['fail']} failed, {counts['warn']} warnings, {len(levels)} checks"
        output(f"{name}: {verdict}, {perf_counter() - start:.0f} s")
    return EXIT_INPUT if counts["fail"] else 0


def examine(patient: Patient, checks: Sequence[Check]) -> list[str]:
    """Collective: make the checks in their order, print each line at once, and return their levels."""
    levels: dict[str, str] = {}
    for check in checks:
        missing = [name for name in check.needs if levels.get(name) not in ("pass", "warn")]
        patient.world.pulse.enter(f"doctor: {check.name}")
        if missing:
            finding = Finding("skip", f"needs {' and '.join(missing)}")
        else:
            findings = patient.world.all_gather_object(looked(check, patient))
            finding = worst(findings, lambda ranks: named(ranks, patient.launch, patient.world))
        levels[check.name] = finding.level
        if patient.world.is_main:
            output(finding.line(check.name))
    return list(levels.values())


def looked(check: Check, patient: Patient) -> Finding:
    """What this rank finds; what goes wrong in a check is what it finds. Raises InputError where others would wait."""
    try:
        return check.look(patient)
    except torch.OutOfMemoryError:
        found = failed("out of GPU memory", speed.SMALLER)
    except (InputError, RunStopped, OSError, ValueError) as error:
        found = failed(str(error))
    if check.together and patient.world.size > 1:
        raise InputError(found.line(check.name))
    return found


def named(ranks: list[int], launch: Launch, world: World) -> str:
    """Ranks in words; "" for all."""
    return "" if len(ranks) == world.size else join(launch).whom(ranks)


def scratch_beside(folder: Path) -> Path:
    """A new folder on the disk of `folder`, and not in it, where a run may be live; in it where it is a disk of its
    own, or nothing can be written beside it."""
    real = Path(os.path.realpath(folder))
    above = next(path for path in real.parents if path.is_dir())
    places = [above, real] if real.is_dir() else [above]
    if real.is_dir() and real.stat().st_dev != above.stat().st_dev:
        places.reverse()
    for place in places[:-1]:
        with suppress(OSError):
            return Path(tempfile.mkdtemp(prefix=".ghostmask-doctor-", dir=place))
    return Path(tempfile.mkdtemp(prefix=".ghostmask-doctor-", dir=places[-1]))
