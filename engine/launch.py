"""Which rank is this process, of how many, as torchrun, srun or nobody started it? Only here is that read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ghostmask.engine.errors import InputError, bad_value

PORTS = (20000, 12000)
"""First port and number of ports that steps of Slurm jobs meet at: below those that Linux hands out by itself."""


@dataclass(frozen=True)
class Launch:
    """One process among those that were started together.

    rank in [0, size); local_rank in [0, local_size): its number on its machine; address, port: where the ranks meet, ""
    and 0 for one rank alone; agent: whether the launcher (torchrun) keeps the store there, rather than rank 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    agent: bool = False
    restarts: int = 0
    """How often torchrun starts ranks again, maybe other numbers of them (its --max-restarts)."""


def read_launch(env: Mapping[str, str] | None = None) -> Launch:
    """The launch that `env` (None: the process's own) describes; one rank alone where nothing does.

    RANK and WORLD_SIZE (torchrun and whoever follows it) come first, then those of a Slurm step (srun); an sbatch
    script's own shell is one rank. Raises InputError that names the variable that is missing, odd or contradictory.
    """
    env = os.environ if env is None else env
    if "RANK" in env or "WORLD_SIZE" in env:
        return _by_rank(env)
    if _is_slurm_step(env):
        return _by_slurm(env)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if env.get(name, "1") not in ("", "1"):
            raise bad_value(name, env[name], "mpirun's ranks are not known here; use torchrun, srun or --ranks N")
    return Launch()


def device_index(local_rank: int, visible: int) -> int:
    """The GPU of a rank among the `visible` ones; launchers that show each rank its own GPU only make that number 0."""
    return local_rank % visible


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "rack[2-3]n[01-04,09],other" -> "rack2n01"."""
    first = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_on(counts: str, node: int) -> int:
    """Tasks on the step's node number `node` in Slurm's short form: ("4(x2),3", 2) -> 3."""
    spread = [
        int(tasks) for tasks, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", counts) for _ in range(int(times or 1))
    ]
    return spread[node] if node < len(spread) else 1


def _by_rank(env: Mapping[str, str]) -> Launch:
    size = _number(env, "WORLD_SIZE", 1, needed_by="RANK")
    rank = _number(env, "RANK", 0, size, needed_by=f"WORLD_SIZE={size}") if size > 1 or "RANK" in env else 0
    if size == 1:
        return Launch()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name, "").strip()]
    if missing:
        raise InputError(
            f"{' and '.join(missing)}: not set, but RANK={rank} WORLD_SIZE={size} are, so the ranks cannot meet; start "
            "them with torchrun, srun or --ranks N, or unset RANK and WORLD_SIZE"
        )
    local = _number(env, "LOCAL_RANK", 0, needed_by=f"WORLD_SIZE={size}")
    local_size = _number(env, "LOCAL_WORLD_SIZE", 1, size + 1) if "LOCAL_WORLD_SIZE" in env else local + 1
    if local >= local_size:
        raise bad_value("LOCAL_RANK", local, f"is not below LOCAL_WORLD_SIZE = {local_size}")
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port, restarts = _number(env, "MASTER_PORT", 1, 65536), env.get("TORCHELASTIC_MAX_RESTARTS", "0")
    again = int(restarts) if restarts.isdecimal() else 0
    return Launch(rank, size, local, local_size, env["MASTER_ADDR"].strip(), port, agent, again)


def _is_slurm_step(env: Mapping[str, str]) -> bool:
    """srun alone sets the step's number of tasks; sbatch and salloc speak of the job only."""
    return "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env


def _by_slurm(env: Mapping[str, str]) -> Launch:
    size = _number(env, "SLURM_STEP_NUM_TASKS", 1)
    rank = _number(env, "SLURM_PROCID", 0, size)
    if size == 1:
        return Launch()
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    address = env.get("MASTER_ADDR", "").strip() or first_host(nodes)
    if not address:
        raise InputError("SLURM_STEP_NODELIST: not set, so the tasks of srun cannot meet; set MASTER_ADDR to a host")
    if env.get("MASTER_PORT", "").strip():
        port = _number(env, "MASTER_PORT", 1, 65536)
    else:
        job, step = _number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID", 0)
        port = PORTS[0] + (job * 31 + step) % PORTS[1]
    node = _number(env, "SLURM_NODEID", 0) if "SLURM_NODEID" in env else 0
    local_size = tasks_on(env.get("SLURM_STEP_TASKS_PER_NODE", ""), node)
    local = _number(env, "SLURM_LOCALID", 0, needed_by=f"SLURM_STEP_NUM_TASKS={size}")
    return Launch(rank, size, local, max(local_size, local + 1), address, port)


def _number(env: Mapping[str, str], name: str, low: int, end: int | None = None, *, needed_by: str = "") -> int:
    """The whole number in [low, end) that variable `name` holds."""
    text = env.get(name)
    if text is None:
        raise InputError(f"{name}: not set{f', but {needed_by} is' if needed_by else ''}; set both, or neither")
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text) or not low <= int(text) or (end is not None and int(text) >= end):
        allowed = f"from {low} to {end - 1}" if end is not None else f"of at least {low}"
        raise bad_value(name, text, f"give a whole number {allowed} (a launcher sets it), or unset it")
    return int(text)
