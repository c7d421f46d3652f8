"""ghostmask train --dry-run: what would this run be, and what would it take? A few real steps say it; none is kept."""

from __future__ import annotations

from ghostmask.engine.errors import output
from ghostmask.launcher.banner import banner
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.doctor import disk, speed
from ghostmask.launcher.doctor.finding import Check
from ghostmask.launcher.doctor.patient import Patient
from ghostmask.launcher.doctor.run import look_at

CHECKS = (
    Check("folder", disk.folder),
    Check("data", speed.data),
    Check("network", speed.network, needs=("data",)),
    Check("step", speed.step, needs=("network", "folder"), together=True),
    Check("disk", disk.disk, needs=("step",), together=True),
    Check("estimate", speed.estimate, needs=("step",), together=True),
)
"""Those of ghostmask doctor that a banner, and time, memory and disk, need."""


def dry_run(config: RunConfig) -> int:
    """Collective: print the run's banner and what time, memory and disk it would take; returns 0, or EXIT_INPUT where
    it would not run. Nothing of the run is written."""
    return look_at(config, CHECKS, "dry run", _show)


def _show(patient: Patient) -> None:
    if patient.run is not None and patient.world.is_main:
        output(banner(patient.run))
