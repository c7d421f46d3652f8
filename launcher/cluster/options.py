"""What is asked of the cluster: options of `ghostmask submit`, and a site's defaults for them in one file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from ghostmask.engine.errors import InputError, bad_value, unknown_name
from ghostmask.launcher.values import convert
from ghostmask.launcher.yaml_text import Plain, read_yaml_file

VARIABLE = "GHOSTMASK_CLUSTER"
SITE_FILE = "~/.config/ghostmask/cluster.yaml"
CLUSTERS = ("slurm", "local", "debug")
SIGNAL_S = 120
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
LARGEST = 1_000_000


@dataclass(frozen=True)
class ClusterOptions:
    """What a job asks for. Each is an option of `ghostmask submit` (--gpus-per-node) and a key of the site's file
    (gpus_per_node)."""

    nodes: int = 1
    """Machines."""
    min_nodes: int = 0
    """Start, or go on, on as few machines where no more are free; 0 = on all or none. Needs train.replicas."""
    gpus_per_node: int = 0
    """GPUs on each of them; one rank each."""
    tasks_per_node: int = 0
    """Ranks on each machine; 0 = one per GPU, and one where there are none."""
    cpus_per_task: int = 0
    """Cores of a rank, for its data workers too; 0 = the site's default."""
    mem_gb: int = 0
    """Memory of a machine in GB; 0 = the site's default."""
    time: str = "1:00:00"
    """Time limit, as Slurm writes it (minutes, H:MM:SS, D-HH:MM:SS). The run saves before it, and is queued again."""
    signal_s: int = SIGNAL_S
    """Seconds before the time limit at which ranks are told to save: a step and a save must fit."""
    partition: str = ""
    """Partition (queue)."""
    account: str = ""
    """Account that is charged."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that machines must have."""
    exclude: str = ""
    """Machines that are left out."""
    comment: str = ""
    """Comment of the job."""
    interface: str = ""
    """Network interface for NCCL and gloo, such as ib0; empty = they choose."""
    setup: tuple[str, ...] = ()
    """Lines of the job's script before the ranks start, such as "module load cuda"."""
    sbatch: tuple[str, ...] = ()
    """Other arguments of sbatch, such as "reservation=night", or "exclusive" without a value."""
    srun: tuple[str, ...] = ()
    """Other arguments of srun, such as --srun=--cpu-bind=cores."""

    def __post_init__(self) -> None:
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if not low <= value <= LARGEST:
                raise bad_value(name, value, f"give a whole number from {low} to {LARGEST}")
        if self.min_nodes > self.nodes:
            raise bad_value("min_nodes", self.min_nodes, f"is more than nodes = {self.nodes}; give less")
        seconds(self.time)
        for text in self.sbatch:
            if not re.fullmatch(r"[a-z][a-z-]*(=.*)?", text):
                raise bad_value("sbatch", text, "give an argument without its dashes, such as reservation=night")

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> list[int]:
        """Ranks that the job may have, from the least."""
        return [nodes * self.ranks_per_node for nodes in range(self.min_nodes or self.nodes, self.nodes + 1)]


LOWEST = {
    "nodes": 1,
    "min_nodes": 0,
    "gpus_per_node": 0,
    "tasks_per_node": 0,
    "cpus_per_task": 0,
    "mem_gb": 0,
    "signal_s": 1,
}


def read_options(given: Mapping[str, Any]) -> ClusterOptions:
    """The defaults, then the site's file, then what is `given` and not None. Raises InputError."""
    options = ClusterOptions()
    file = site_file()
    if file is not None:
        values = read_yaml_file(file)
        if not isinstance(values, dict):
            raise InputError(f"{file}: give options as `key: value` lines")
        options = _replaced(options, values, f"{file}: ")
    return _replaced(options, {name: value for name, value in given.items() if value is not None}, "--")


HERE = ("tasks_per_node", "gpus_per_node", "time", "interface", "setup", "nodes")
"""What --cluster local and debug read; the rest is for Slurm."""


def typed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the command line's arguments those that are options, numbers read as in a YAML file; None: not given."""
    hints = get_type_hints(ClusterOptions)
    return {
        name: Plain(value) if hints[name] is int and value is not None else value
        for name, value in arguments.items()
        if name in hints
    }


def site_file() -> Path | None:
    """The file with the site's defaults, None where there is none. Raises InputError where $GHOSTMASK_CLUSTER names one
    that is not there."""
    named = os.environ.get(VARIABLE, "")
    file = Path(os.path.expanduser(named or SITE_FILE))
    if not named and not file.is_file():
        return None
    if not file.is_file():
        raise bad_value(VARIABLE, named, "there is no such file; correct or unset the variable")
    return file


def seconds(time: str) -> int:
    """Seconds of a time limit as Slurm writes it. Raises InputError."""
    found = TIME.fullmatch(time)
    if not found:
        raise bad_value("time", time, "give minutes, H:MM:SS or D-HH:MM:SS, such as 12:00:00")
    days, first, second, third = (int(part) if part else None for part in found.groups())
    if days is not None:
        total = ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        total = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:
        total = (first or 0) * 60 + (second or 0)
    if not 60 <= total <= 366 * 86400:
        raise bad_value("time", time, "give from a minute to a year")
    return total


def _replaced(options: ClusterOptions, values: Mapping[str, Any], prefix: str) -> ClusterOptions:
    hints = get_type_hints(ClusterOptions)
    names = [field.name for field in fields(ClusterOptions)]
    found = {}
    for name, value in values.items():
        if name not in names:
            raise unknown_name(f"{prefix}option", str(name), names)
        found[name] = convert(f"{prefix}{name}", value, hints[name])
    return replace(options, **found)
