"""How the .beton files of a dataset are brought up to date: what is missing, what it costs, what is wrong with it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ghostmask.data_pipelines.beton import peek_manifest, publish, read_manifest
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.source import SPLITS, Images, Source
from ghostmask.data_pipelines.writing.write import Written, journal_path, measure_images, write_images
from ghostmask.engine.cores import usable_cores
from ghostmask.engine.errors import InputError, bad_value, printable, say, to_stderr

FIRST_FEW = 3
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What flock says on a file system without locks, such as Lustre by default."""


def bring_up_to_date(config: DataConfig, source: Source, progress: bool) -> dict[str, Path]:
    """See open.prepare."""
    paths = {split: source.beton(config.root, split) for split in SPLITS}
    folder = paths["train"].parent
    if not _outdated(source, paths):
        if progress:
            say(f"nothing to do: the .beton files in {folder} are whole and as new as their source")
        return paths
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / ".lock"):
            images = {split: source.images(split) for split in _outdated(source, paths)}
            for split, some in images.items():
                if not len(some):
                    raise InputError(f"data.dataset: {source.name} has no {split} images")
            _check_space(source, images, paths, progress)
            for split, some in images.items():
                _write(config, source, split, some, paths, progress)
    except OSError as error:
        raise bad_value("data.root", config.root, f"the .beton files cannot be written there ({error})") from error
    return paths


def _outdated(source: Source, paths: dict[str, Path]) -> list[str]:
    """The splits that must be written."""
    fingerprint = source.fingerprint()
    outdated = []
    for split, path in paths.items():
        try:
            manifest = read_manifest(path)
        except InputError:
            outdated.append(split)
            continue
        other = manifest.settings != source.settings.get(split, {})  # which its name does not always tell
        if other or (fingerprint is not None and manifest.fingerprint != fingerprint):
            outdated.append(split)
    return outdated


def _check_space(source: Source, images: dict[str, Images], paths: dict[str, Path], progress: bool) -> None:
    """Say what writing will cost, before anything is written. Raises InputError where the disk has not the room."""
    costs = [measure_images(some) for some in images.values()]
    folder = paths["train"].parent
    there = sum(_taken(_partial(paths[split])) for split in images)
    needed = max(0, sum(cost.num_bytes for cost in costs) - there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        fix = f"about {needed:,} bytes are needed and {free:,} are free; make room, or give another data.root"
        raise InputError(f"data.root: {folder}: {fix}")
    if progress:
        number, minutes = sum(map(len, images.values())), sum(cost.seconds for cost in costs) / _cores(source) / 60
        took = f", {minutes:,.0f} minutes" if minutes >= 1 else ""
        say(printable(f"{number:,} images to write: about {needed / 1e9:,.2f} GB{took}; {free / 1e9:,.1f} GB are free"))


def _write(
    config: DataConfig, source: Source, split: str, images: Images, paths: dict[str, Path], progress: bool
) -> None:
    path, fingerprint = paths[split], source.fingerprint()
    partial, listed = _partial(path), path.with_suffix(".bad.txt")
    written = write_images(
        images, partial, num_workers=_cores(source), name=path.name if progress else None, identity=str(fingerprint)
    )
    listed.unlink(missing_ok=True)
    if written.bad:
        _say_what_is_bad(config, written.bad, len(images), listed)
    num_classes = _classes(source, split, written, paths)
    publish(
        partial, path, fingerprint=str(fingerprint), num_images=sum(written.counts), num_classes=num_classes,
        content=written.content, counts=written.counts + [0] * (num_classes - len(written.counts)),
        classes=source.class_names(), words=source.class_words(), left_out=len(written.bad),
        settings=source.settings.get(split, {}),
    )  # fmt: skip
    journal_path(partial).unlink(missing_ok=True)


def _say_what_is_bad(config: DataConfig, bad: list[str], total: int, listed: Path) -> None:
    """A warning, or an InputError where data.bad_images = stop or nothing is left; all are named in `listed`."""
    bad = sorted(bad)
    listed.write_text("".join(f"{printable(text)}\n" for text in bad))
    more = f"; all of them: {listed}" if len(bad) > FIRST_FEW else ""
    text = f"{len(bad)} of {total:,} images: {'; '.join(bad[:FIRST_FEW])}{more}"
    if config.bad_images == "skip" and len(bad) < total:
        to_stderr(printable(f"left out: {text}"))
        return
    raise InputError(f"data.root: {text}; or leave such images out: data.bad_images=skip")


def _classes(source: Source, split: str, written: Written, paths: dict[str, Path]) -> int:
    """How many there are: the source knows, or the training images."""
    known = source.num_classes
    if not known and split != "train" and (manifest := peek_manifest(paths["train"])):
        known = manifest.num_classes
    if known and len(written.counts) > known:
        raise InputError(f"data.root: {split} has images of class {len(written.counts) - 1}, train has {known} classes")
    return known or len(written.counts)


def _cores(source: Source) -> int:
    return usable_cores() if source.augmentation.resized_crop else 1


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial")


def _taken(path: Path) -> int:
    """Bytes on disk."""
    return path.stat().st_blocks * 512 if path.exists() else 0


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time, where the file system knows of locks; a killed holder lets go by itself."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # not "w": that waits for ever for a pipe
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            to_stderr(printable(f"another process writes .beton files to {lock.parent}; waiting for it"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            to_stderr(printable(f"{lock.parent} has no locks ({error.strerror}): start no second prepare there"))
        yield
    finally:
        os.close(handle)
