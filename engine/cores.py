"""How many cores may a process use, bound to some and within its cgroups' CPU quota, and what is a rank's share?"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ghostmask.engine.launch import read_launch

ROOT = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """At least 1."""
    bound = len(os.sched_getaffinity(0))
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return bound
    return max(1, math.ceil(min(bound, quota(groups))))


def cores_per_rank() -> int:
    """usable_cores divided among the ranks of this machine, at least 1."""
    return max(1, usable_cores() // read_launch().local_size)


def quota(groups: str, root: Path = ROOT) -> float:
    """The smallest CPU quota, in cores, of the cgroups in `groups` (the text of /proc/self/cgroup); inf without one.

    A quota of a group above holds too. In a container the group's own path may be absent below `root`, which then is
    the container's group itself.
    """
    return min((cores for folder in _folders(groups, root) for cores in _limits(folder)), default=math.inf)


def _folders(groups: str, root: Path) -> Iterator[Path]:
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / "cpu", root / "cpu,cpuacct"] if controllers else [root, root / "unified"]
        relative = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            yield mount
            yield from (mount / part for part in (relative, *relative.parents) if ".." not in part.parts)


def _limits(folder: Path) -> Iterator[float]:
    """v2: "max 100000" or "150000 100000" in cpu.max; v1: two files, quota -1 without one."""
    try:
        if (folder / "cpu.max").is_file():
            allowed, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        if allowed.isdecimal() and int(allowed) > 0:
            yield int(allowed) / int(period or 100000)
    except (OSError, ValueError):
        return
