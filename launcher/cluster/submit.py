"""ghostmask submit: runs become jobs, through submitit."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ghostmask.engine.atomic import replacing
from ghostmask.engine.errors import InputError, bad_value, output
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.cluster.ended import RUNS
from ghostmask.launcher.cluster.job import TrainJob
from ghostmask.launcher.cluster.options import ClusterOptions, seconds
from ghostmask.launcher.cluster.record import JobRecord, read_job, write_job
from ghostmask.launcher.cluster.snapshot import take_snapshot
from ghostmask.launcher.cluster.standing import active_jobs
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.folder import networks, resumed
from ghostmask.launcher.locate import check_writable
from ghostmask.launcher.record import check_folder
from ghostmask.launcher.settings import run_folder, to_yaml

LAST_S = 300
"""After the first rank has ended the others are given so long, before Slurm ends them."""
LOCAL_SIGNAL_S = 30
"""Before its time limit a local job is told to save: submitit's own choice."""


def submit(
    configs: Sequence[RunConfig], options: ClusterOptions, *, cluster: str = "slurm", flags: Sequence[str] = (),
    chain: int = 1, parallel: int = 0, dry_run: bool = False, command: Sequence[str] = (),
) -> int:  # fmt: skip
    """Submit a job per configuration, as one array where there are several; returns 0, of `debug` the run's code.

    flags: of `ghostmask train`, for the first attempt; chain: jobs that follow each other, for sites where a job may
    not queue itself again; parallel: how many of an array run at a time, 0 = all; dry_run: print the script and the
    configuration instead; command: what was typed, to be written down. Raises InputError, before anything is written,
    for a run that could not be trained or that has a job.
    """
    configs = [_checked(config, options) for config in configs]
    runs = [run_folder(config).absolute() for config in configs]
    if chain > 1 and (len(runs) > 1 or cluster != "slurm"):
        raise InputError("--chain: is for one run on Slurm; leave it out, or submit the runs of a sweep one by one")
    if cluster != "slurm" and (options.nodes > 1 or len(runs) > 1):
        raise InputError(f"--cluster {cluster}: is one machine and one run; leave --nodes and --sweep out")
    for run in runs:
        _refuse_active(run)
    group = Path(os.path.commonpath(runs))
    # A sweep's array has a place of its own: other runs of the same group may be submitted while it runs.
    home = runs[0] if len(runs) == 1 else group / time.strftime("array-%Y%m%d-%H%M%S")
    code, jobs = home / "code", home / "job"
    executor = _executor(cluster, jobs, code, options, group.name, parallel, chain)
    if dry_run:
        if cluster == "slurm":
            output(_script(executor, len(runs)))
        output(
            "\n".join(f"# {run / 'job' / 'config.yaml'}\n{to_yaml(c)}" for run, c in zip(runs, configs, strict=True))
        )
        return 0
    take_snapshot(code, {name for config in configs for name in networks(config)})
    tasks = [_task(config, run, options, cluster, flags) for config, run in zip(configs, runs, strict=True)]
    jobs.mkdir(parents=True, exist_ok=True)
    with replacing(jobs / RUNS) as writing:
        writing.write_text(json.dumps([str(run) for run in runs]))
    if cluster == "debug":
        try:
            return int(executor.submit(tasks[0]).results()[0])
        except SystemExit as ended:
            return int(ended.code or 0)
    with _nothing_inherited() if cluster == "local" else nullcontext():
        ids = _hand_over(executor, tasks, chain)
    for number, run in enumerate(runs):
        mine = ids if len(runs) == 1 else [ids[number]]
        tasks_of = 1 if cluster == "local" else options.ranks[-1]
        write_job(run, JobRecord(cluster, mine, str(jobs), time.time(), tasks_of, list(command)))
        output(f"{run_folder(configs[number])}: job {', '.join(mine)}")
    output(f"ghostmask status {run_folder(configs[0])}      ghostmask logs {run_folder(configs[0])} --follow")
    return 0


@contextmanager
def _nothing_inherited() -> Iterator[None]:
    """The process of a local job stays when this one ends: a pipe of ours that it held would never be at its end."""
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _checked(config: RunConfig, options: ClusterOptions) -> RunConfig:
    config = resumed(config)
    for ranks in options.ranks:
        check_config(config, ranks)
    if len(options.ranks) > 1 and not config.train.replicas:
        raise bad_value(
            "train.replicas", 0, f"with min_nodes give a number that all of {options.ranks} ranks divide, such as "
            f"{math.lcm(*options.ranks)}"
        )  # fmt: skip
    run = run_folder(config)
    check_folder(run)
    check_writable(run, "run", config.run)
    return replace(config, run=str(run.absolute()))


def _refuse_active(run: Path) -> None:
    record = read_job(run)
    active = active_jobs(record) if record is not None else []
    if active:
        raise InputError(f"run = {str(run)!r}: has job {', '.join(active)}; wait for it, or: ghostmask cancel {run}")


def _executor(
    cluster: str, jobs: Path, code: Path, options: ClusterOptions, name: str, parallel: int, chain: int
) -> Any:
    import submitit

    try:
        executor = submitit.AutoExecutor(jobs, cluster=cluster)
    except RuntimeError as error:  # no srun
        raise InputError(f"--cluster slurm: {error}; submit where sbatch is, or give --cluster local") from None
    if cluster == "debug":
        return executor
    minutes = -(-seconds(options.time) // 60)
    common = {"timeout_min": minutes, "name": name, "stderr_to_stdout": True}
    if cluster == "local":
        executor.update_parameters(**common, gpus_per_node=options.gpus_per_node, local_setup=_setup(code, options))
        return executor
    if options.signal_s >= seconds(options.time):
        raise bad_value("signal_s", options.signal_s, f"is not below the time limit, {options.time}; give less")
    wanted: dict[str, Any] = {
        "slurm_time": minutes, "slurm_signal_delay_s": options.signal_s, "nodes": options.nodes,
        "tasks_per_node": options.ranks_per_node, "gpus_per_node": options.gpus_per_node or None,
        "cpus_per_task": options.cpus_per_task or None, "mem_gb": options.mem_gb or None,
        "slurm_setup": _setup(code, options), "slurm_teardown": _teardown(jobs),
        "slurm_srun_args": _srun(options), "slurm_array_parallelism": parallel or None,
        "slurm_additional_parameters": _sbatch(options, chained=chain > 1),
    }  # fmt: skip
    names = ("partition", "account", "qos", "constraint", "exclude", "comment")
    wanted |= {f"slurm_{name}": getattr(options, name) or None for name in names}
    executor.update_parameters(**common, **wanted)
    return executor


def _task(config: RunConfig, run: Path, options: ClusterOptions, cluster: str, flags: Sequence[str]) -> TrainJob:
    """Writes the run's resolved configuration, which its job reads."""
    file = run / "job" / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as writing:
        writing.write_text(to_yaml(config), encoding="utf-8")
    if cluster == "slurm":
        return TrainJob(str(file), str(run), tuple(flags))
    end_s = float(seconds(options.time) - LOCAL_SIGNAL_S)
    return TrainJob(str(file), str(run), tuple(flags), options.ranks_per_node, end_s)


def _hand_over(executor: Any, tasks: list[TrainJob], chain: int) -> list[str]:
    """Ids of the jobs, in order."""
    import submitit

    try:
        if len(tasks) > 1:
            return [job.job_id for job in executor.submit_array(tasks)]
        ids = [executor.submit(tasks[0]).job_id]
        for _ in range(chain - 1):
            executor.update_parameters(slurm_dependency=f"afterany:{ids[-1]}")
            ids.append(executor.submit(replace(tasks[0], flags=())).job_id)
        return ids
    except submitit.core.utils.FailedJobError as error:
        raise InputError(f"--cluster slurm: sbatch refused the job: {' '.join(str(error).split())}") from None


def _setup(code: Path, options: ClusterOptions) -> list[str]:
    lines = list(options.setup)
    if options.interface:
        lines += [
            f"export {name}={shlex.quote(options.interface)}" for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        ]
    # Without safe path the working directory, which may be the very checkout that is edited, would go before the copy.
    return [
        *lines,
        "export PYTHONSAFEPATH=1",
        f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
    ]


def _teardown(jobs: Path) -> list[str]:
    command = [sys.executable, "-m", "ghostmask.launcher.cluster.ended", str(jobs)]
    return [f'{shlex.join(command)} "$?"', "exit $?"]


def _srun(options: ClusterOptions) -> list[str]:
    # Ranks end by themselves when one has failed: they say why first, and finish a save. One that is stopped cannot.
    given = ["--open-mode=append", "--kill-on-bad-exit=0", f"--wait={LAST_S}", *options.srun]
    return [*given, f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else given


def _sbatch(options: ClusterOptions, chained: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"no-requeue" if chained else "requeue": True, "wckey": "ghostmask"}
    if options.min_nodes:
        found["nodes"] = f"{options.min_nodes}-{options.nodes}"
    for text in options.sbatch:
        name, equals, value = text.partition("=")
        found[name] = value if equals else True
    return found


def _script(executor: Any, count: int) -> str:
    slurm_executor = executor._executor  # submitit has no public way to a script that is not submitted
    if count > 1:
        slurm_executor.parameters["map_count"] = count
    return str(slurm_executor._make_submission_file_text(slurm_executor._submitit_command_str, "dry-run"))
