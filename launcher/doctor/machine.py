"""The doctor's checks of each rank's machine: software, GPUs, the code, the settings."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ghostmask.engine.cores import cores_per_rank, usable_cores
from ghostmask.launcher.doctor.finding import Finding, failed, passed, warned
from ghostmask.launcher.doctor.patient import Patient
from ghostmask.launcher.folder import networks
from ghostmask.launcher.record import versions
from ghostmask.launcher.run import usable_threads
from ghostmask.launcher.settings import flat

SHOWN = 5
"""Differences that are named; the others are counted."""
FREE_SHARE = 0.8
"""Of a GPU's memory that should be free before the run begins; CUDA and NCCL have taken theirs by then."""


def software(patient: Patient) -> Finding:
    """Collective: the versions are the same on every rank."""
    here = {"python": platform.python_version(), **versions(), "cuda": str(torch.version.cuda)}
    differing = differences(here, patient.world.broadcast_object(here))
    if differing:
        return failed(f"other versions than on rank 0: {differing}", "install constraints.txt on every node")
    return passed(", ".join(f"{name} {version}" for name, version in here.items()))


def devices(patient: Patient) -> Finding:
    """Collective: every rank has a GPU of its own, which nobody else fills; or the CPU, where there is none."""
    place = patient.world.device
    if place.type != "cuda":
        return processors(patient.config.train.device, list(Path("/dev").glob("nvidia[0-9]*")))
    properties = torch.cuda.get_device_properties(place)
    free, total = torch.cuda.mem_get_info(place)
    identity = str(getattr(properties, "uuid", f"{platform.node()} {place}"))
    shared = sharers(patient.world.all_gather_object(identity), patient.world.rank)
    if shared:
        return failed(
            f"shares its GPU with ranks {shared}", "start one rank per GPU: two NCCL ranks cannot use the same one"
        )
    text = f"{properties.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {usable_cores()} cores"
    if free < FREE_SHARE * total:
        return warned(text, "end what else runs on it (nvidia-smi shows it)")
    return passed(text)


def processors(asked: str, drivers: Sequence[Path]) -> Finding:
    """A rank on the CPU; drivers: of GPUs that are there and that torch does not see."""
    if asked == "auto" and drivers:
        return failed(
            f"{drivers[0]} is there, but torch sees no GPU",
            "install the torch of the driver's CUDA (nvidia-smi shows it), unset CUDA_VISIBLE_DEVICES, or say "
            "train.device=cpu",
        )
    return passed(f"no GPU: {usable_cores()} cores of {platform.processor() or platform.machine()}")


def code(patient: Patient) -> Finding:
    """Collective: every rank runs the same files."""
    here = package_files(networks(patient.config))
    digest = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()
    if len(set(patient.world.all_gather_object(digest))) > 1:
        differing = differences(here, patient.world.broadcast_object(here), values=False)
        if differing:
            return failed(f"other files than on rank 0: {differing}", "install the same ghostmask on every node")
    return passed(f"{len(here)} files in {package_folder()}, {digest[:12]}")


def package_folder() -> Path:
    """Where the ghostmask that runs here lies."""
    return Path(sys.modules[__name__.partition(".")[0]].__file__ or "").parent


def package_files(models: Iterable[str]) -> dict[str, str]:
    """Name -> SHA-256 of every Python file of ghostmask, and of the modules of networks of the user's own."""
    package = package_folder()
    files = {
        os.path.relpath(os.path.join(at, name), package): Path(at, name)
        for at, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py")
    }
    for model in models:
        spec = importlib.util.find_spec(model.partition(":")[0]) if ":" in model else None
        if spec is not None and spec.origin is not None:
            files[spec.name] = Path(spec.origin)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def settings(patient: Patient) -> Finding:
    """Collective: every rank was given the same settings, and sees the cores that they ask for."""
    here = {name: str(value) for name, value in flat(patient.config).items()}
    differing = differences(here, patient.world.broadcast_object(here))
    if differing:
        return failed(f"other settings than rank 0: {differing}", "give all nodes the same config file and arguments")
    config, ranks = patient.config, patient.launch.local_size
    workers, cores = config.data.num_workers or cores_per_rank(), usable_cores()
    text = f"batch {config.data.batch_size} in {config.train.replicas} parts on {patient.world.size} ranks"
    if ranks * workers > max(cores, ranks):
        each = max(1, cores // ranks)
        return warned(
            f"{text}; {ranks} ranks with {workers} loader threads each share {cores} cores",
            f"data.num_workers={each}, or 0",
        )
    threads = f", {usable_threads(config.train.threads)} threads" if patient.world.device.type == "cpu" else ""
    return passed(f"{text}, {workers} loader threads{threads} each")


def differences(here: Mapping[str, str], there: Mapping[str, str], *, values: bool = True) -> str:
    """In words, what differs here from rank 0; "" where nothing does. values: say them too."""
    names = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    told = [f"{n} {here.get(n, 'absent')} (rank 0: {there.get(n, 'absent')})" if values else n for n in names[:SHOWN]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(told) + more


def sharers(identities: Sequence[str], rank: int) -> str:
    """The other ranks that have the GPU of `rank`, in words; "" where it is alone."""
    return ", ".join(str(r) for r, one in enumerate(identities) if one == identities[rank] and r != rank)
