"""How is a run's folder opened: by its one owner, who trains in it, or by readers, who write nothing of the run's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ghostmask.engine.agree import on_main
from ghostmask.engine.atomic import replacing
from ghostmask.engine.checkpoint.files import clear_unfinished
from ghostmask.engine.checkpoint.store import CheckpointError, CheckpointStore, Saved
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.errors import InputError, say, to_stderr
from ghostmask.engine.lease import Lease
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.folder import check_saved, data_changes, sealed_config
from ghostmask.launcher.record import (
    FILE,
    Record,
    check_folder,
    new_record,
    read_record,
    remove_written,
    versions,
    write_record,
)
from ghostmask.launcher.settings import differences, to_yaml
from ghostmask.launcher.source import Source

START_OVER = "; run with --restart to start over (this removes the run's files)"


@dataclass
class OpenRun:
    """A run folder that this process owns. store: of its checkpoints; saved: where to go on, None at the start."""

    folder: Path
    store: CheckpointStore
    saved: Saved | None
    lease: Lease | None

    def holds(self) -> bool:
        """Whether the folder is still this run's to write to; asked on rank 0."""
        return self.lease is None or self.lease.holds()

    def release(self) -> None:
        """Give the folder back."""
        if self.lease is not None:
            self.lease.release()


def open_owned(
    folder: Path,
    config: RunConfig,
    world: World,
    data: DataPipeline,
    *,
    restart: bool = False,
    source: Source | None = None,
    new_data: bool = False,
) -> OpenRun:
    """Collective: own the run folder, and find the newest intact checkpoint of the run, or of the run to start from.

    restart: remove what the run before wrote. new_data: go on although the data are others than before. Raises
    InputError: the folder has an owner, is no run's, or holds a run of other settings or data. Nothing but the lease is
    written before all of that is known.
    """
    if source is not None and source.folder.resolve() == folder.resolve():
        raise InputError(f"--from {source}: is the run itself; give the new one another name: run=NAME")
    leases: list[Lease] = []

    def take() -> Record:
        check_folder(folder)
        leases.append(Lease.take(folder, config.checkpoint.takeover_s, say=say))
        if restart and read_record(folder) is not None:
            left = remove_written(folder)
            if left:
                say(f"{folder}: --restart left what no run wrote: {', '.join(left)}")
        clear_unfinished(folder / "checkpoints")
        begun = any((folder / "checkpoints").glob("step-*"))
        return (read_record(folder) if begun else None) or new_record(str(source or ""))

    record = on_main(world, take)
    lease = leases[0] if leases else None
    saving = config.checkpoint
    store = CheckpointStore(
        folder / "checkpoints", world, saving.keep, saving.asynchronous, lease=lease, run=record.run
    )  # fmt: skip
    opened = OpenRun(folder, store, None, lease)
    try:
        saved = _newest(store)
        if saved is not None:
            check_saved(folder, saved, config)
            _check_data(folder, saved, data, world, new_data)
        if source is not None:
            saved = saved or _start_from(source, config, data, world)
            _check_source(folder, record, source)
        on_main(world, lambda: _write_once(folder, record, config, saved))
    except InputError:
        store.close()
        opened.release()
        raise
    return replace(opened, saved=saved)


def open_to_read(folder: Path, world: World) -> tuple[Saved | None, CheckpointStore]:
    """Collective: the newest intact checkpoint of the run in `folder`, and a store that only reads.

    The run may be live: who finds that a checkpoint has gone meanwhile takes the next (see `still_there`).
    """
    store = reading_store(folder, world)
    try:
        return store.latest(), store
    except InputError:
        store.close()
        raise


def reading_store(folder: Path, world: World) -> CheckpointStore:
    """Collective: the checkpoints of the run in `folder`, to be read only."""
    record = on_main(world, lambda: read_record(folder))
    return CheckpointStore(folder / "checkpoints", world, run=record.run if record else "")


def check_reading(folder: Path, saved: Saved, config: RunConfig, data: DataPipeline, world: World) -> None:
    """Raise InputError where a checkpoint is of another configuration than config.yaml says; warn where the data, on
    which its network is now looked at, are others than it was trained on."""
    check_saved(folder, saved, config)
    changes = data_changes(saved, data.identity)
    if changes and world.is_main:
        to_stderr(f"the data changed since {saved.path.name} ({'; '.join(changes)}); what follows is measured on them")


def still_there(saved: Saved, world: World) -> bool:
    """Collective: whether a checkpoint is there still, or was retired by the run that goes on."""
    return on_main(world, saved.path.is_dir)


def _newest(store: CheckpointStore) -> Saved | None:
    try:
        return store.latest()
    except CheckpointError as error:
        raise InputError(f"{error}{START_OVER}") from None


def _check_data(folder: Path, saved: Saved, data: DataPipeline, world: World, accept: bool) -> None:
    changes = data_changes(saved, data.identity)
    if not changes:
        return
    what = f"run = {str(folder)!r}: its data changed since {saved.path.name} ({'; '.join(changes)})"
    lengths = ("steps per epoch", "batch size", "classes")
    if any(saved.meta.get("data", {}).get(name) != data.identity[name] for name in lengths):
        raise InputError(
            f"{what}: its epochs would be other ones; bring the data back, or start a new run from it: ghostmask train "
            f"CONFIG --from {folder} run=NAME"
        )
    if not accept:
        raise InputError(f"{what}; bring them back, or give --new-data to go on with what is there now")
    if world.is_main:
        to_stderr(f"{what}: going on at step {saved.step} with what is there now, as --new-data says")


def _start_from(source: Source, config: RunConfig, data: DataPipeline, world: World) -> Saved:
    """Collective: the checkpoint of another run that this one starts from."""
    saved, store = open_to_read(source.folder, world)
    if source.step is not None:
        found = {one.step: one for one in store.every()}
        if source.step not in found:
            store.close()
            there = ", ".join(map(str, found)) or "none"
            raise InputError(f"--from {source}: there is no intact checkpoint of that step; there are: {there}")
        saved = found[source.step]
    store.close()
    if saved is None:
        raise InputError(f"--from {source}: that run holds no checkpoint yet")
    before, now = saved.meta.get("data", {}).get("steps per epoch"), data.steps_per_epoch
    if before != now:
        raise InputError(
            f"--from {source}: has {before} steps per epoch, this run {now}: its place in the schedules would be "
            "another one; give a data.batch_size that makes them equal, or start a new run"
        )
    if world.is_main:
        changes = differences(sealed_config(source.folder, saved.meta), config)
        words = f" ({'; '.join(changes)})" if changes else ""
        say(f"a new run, from {saved.path} at step {saved.step}, phase {saved.meta['phase']}{words}")
    return saved


def _check_source(folder: Path, record: Record, source: Source) -> None:
    if record.started_from != str(source):
        was = record.started_from or "from its seed"
        raise InputError(
            f"--from {source}: the run in {folder} was started {was}; leave --from out to go on with it, or give "
            "another run=NAME"
        )


def _write_once(folder: Path, record: Record, config: RunConfig, saved: Saved | None) -> None:
    """The run's record and configuration, at its start only; config.yaml again where somebody deleted it."""
    if saved is not None and saved.meta.get("run") == record.run:
        changed = {k: v for k, v in versions().items() if saved.meta.get("versions", {}).get(k, v) != v}
        if changed:
            words = ", ".join(f"{name} {new} (before: {saved.meta['versions'][name]})" for name, new in changed.items())
            to_stderr(f"{saved.path.name} was made with other software: now {words}; the result may differ in its bits")
        if not (folder / FILE).exists():
            write_record(folder, record)
        if (folder / "config.yaml").exists():
            return
        say(f"{folder / 'config.yaml'} was not there; it is written again, from {saved.path.name}")
    else:
        write_record(folder, record)
    with replacing(folder / "config.yaml") as writing:
        writing.write_text(to_yaml(config), encoding="utf-8")
