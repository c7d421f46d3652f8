"""The doctor's checks of the run folder's disk: do all ranks see it, is there room, how fast are checkpoints?"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from time import perf_counter

from ghostmask.engine.agree import on_main
from ghostmask.launcher.banner import checkpoint_bytes
from ghostmask.launcher.doctor.finding import Finding, failed, passed, warned
from ghostmask.launcher.doctor.patient import Patient
from ghostmask.launcher.record import check_folder
from ghostmask.launcher.settings import run_folder

SLOW_SHARE = 0.05
"""Of the time between checkpoints that a save may take before it is said."""


def folder(patient: Patient) -> Finding:
    """Every rank sees the run folder's disk, and may write there; nothing that no run wrote is in the way."""
    check_folder(run_folder(patient.config))
    scratch = patient.scratch
    if not scratch.is_dir():
        return failed(
            f"{scratch}, which rank 0 made, is not there",
            "put the run on a disk that all nodes share: run=/shared/NAME",
        )
    try:
        (scratch / f"rank-{patient.world.rank}").write_bytes(b"")
    except OSError as error:
        return failed(f"nothing can be written to {patient.place} ({error.strerror})", "give another run=FOLDER")
    return passed(f"{run_folder(patient.config)}: every rank can write there")


def disk(patient: Patient) -> Finding:
    """Collective: there is room for the checkpoints that are kept, one more while it is written, and the export."""
    trainer, world = patient.trainer, patient.world
    assert trainer is not None
    patient.checkpoint_bytes = checkpoint_bytes(trainer)
    keep = patient.config.checkpoint.keep
    export = sum(value.nbytes for value in trainer.model.state_dict().values())
    held = on_main(world, lambda: size_of(run_folder(patient.config) / "checkpoints"))
    needed = (keep + 1) * patient.checkpoint_bytes + export - held
    free = shutil.disk_usage(patient.place).free
    return room(needed, free, f"{keep} + 1 checkpoints of {patient.checkpoint_bytes / 1e6:,.0f} MB", patient.place)


def room(needed: int, free: int, what: str, place: Path) -> Finding:
    """needed, free: bytes on the disk of `place`."""
    text = f"{what} need {max(needed, 0) / 1e6:,.0f} MB on the disk of {place}, {free / 1e6:,.0f} MB are free"
    if needed > free:
        return failed(text, "free some, give a run=FOLDER on another disk, or checkpoint.keep=1")
    return passed(text)


def size_of(place: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none. Files that go meanwhile count as nothing."""
    total = 0
    for path in place.rglob("*") if place.is_dir() else ():
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def checkpoint(patient: Patient) -> Finding:
    """Collective: the run's real first checkpoint is written to the disk and read again, both timed."""
    trainer, store = patient.trainer, patient.store
    assert trainer is not None
    assert store is not None
    start = perf_counter()
    trainer.save()
    if not store.wait():
        return failed(f"a checkpoint could not be written to {store.folder}", "look at the lines above")
    patient.save_s = perf_counter() - start
    start = perf_counter()
    saved = store.latest()
    assert saved is not None
    trainer.resume(saved)
    read_s = perf_counter() - start
    megabytes = patient.checkpoint_bytes / 1e6
    text = (
        f"{megabytes:,.0f} MB written in {patient.save_s:.2f} s ({megabytes / patient.save_s:,.0f} MB/s), read and "
        f"verified in {read_s:.2f} s ({megabytes / read_s:,.0f} MB/s, from memory where the system keeps it there)"
    )
    minutes = patient.config.checkpoint.every_minutes
    if minutes and patient.save_s > SLOW_SHARE * 60 * minutes:
        return warned(text, f"checkpoint.every_minutes={math.ceil(40 * patient.save_s / 60)}, or a faster disk")
    return passed(text)
