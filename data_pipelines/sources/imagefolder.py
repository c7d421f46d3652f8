"""How a folder of images becomes a dataset: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, as torchvision reads them.

Or ROOT/val without class folders and a file of labels (data.val_labels), or without ROOT/val and a share of each class
for evaluation (data.val_fraction); then the class folders may also lie in ROOT itself. Hidden files are not looked at.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ghostmask.data_pipelines.beton import FOLDER
from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.photographs.photograph import read_rgb, shrunk
from ghostmask.data_pipelines.photographs.places import OWN_FILE, Place, Places
from ghostmask.data_pipelines.photographs.stored import photographs
from ghostmask.data_pipelines.photographs.val_labels import read_labels
from ghostmask.data_pipelines.source import Source
from ghostmask.engine.errors import InputError, bad_value, printable, to_stderr

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision takes for an image, in small or capital letters."""
SHOWN = 5


def imagefolder(config: DataConfig) -> Source:
    """As many classes as ROOT/train has folders; side data.image_size (0 = 224). Raises InputError for one class."""
    root = Path(config.root)
    train, val = root / "train", root / "val"
    if config.val_fraction and not train.is_dir():
        train = root
    names = class_folders(train)
    if len(names) == 1:
        fix = f"{train} holds one class folder, {names[0]}: are the images one folder too deep?"
        raise bad_value("data.root", config.root, fix)

    def evaluation() -> Places:
        if not val.is_dir():
            fix = f"there is no folder {val}; give one with train/CLASS and val/CLASS, or data.val_fraction"
            raise bad_value("data.root", config.root, fix)
        if config.val_labels:
            return _flat(root, val, Path(config.val_labels), names)
        return _in_classes(root, val, names)

    return photographs(
        config,
        num_classes=len(names),
        train=lambda: _in_classes(root, train, names),
        evaluation=evaluation if val.is_dir() or not config.val_fraction else None,
        present=lambda: bool(names) and (val.is_dir() or bool(config.val_fraction)),
        class_names=lambda: names,
        absent="no train/CLASS folders and no .beton there; give the image folder",
    )


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted: class k is the k-th; [] if there is no such folder. Hidden ones and
    ours are no classes. Raises InputError for a folder that cannot be read."""
    if not folder.is_dir():
        return []
    return sorted(e.name for e in _entries(folder) if e.is_dir() and not e.name.startswith(".") and e.name != FOLDER)


def load_rgb(path: str, max_resolution: int) -> object:
    """The image of a file in RGB, its shorter side at most max_resolution. Raises InputError for any other file."""
    return shrunk(read_rgb(Path(path).read_bytes(), path), max_resolution)


def _in_classes(root: Path, folder: Path, names: list[str]) -> Places:
    """The images below the class folders, in torchvision's order; what is left out is said."""
    here = class_folders(folder)
    if here != names:
        odd = sorted(set(here) ^ set(names))[:SHOWN]
        fix = "train and val must have the same class folders"
        if not here and any(entry.is_file() for entry in _entries(folder)):
            fix = f"{folder} has no class folders; name the file with its labels as data.val_labels, or sort it"
        raise bad_value("data.root", str(root), f"{fix}; they differ in {odd}")
    left_out: list[str] = []

    def found() -> Iterator[Place]:
        empty = []
        for label, name in enumerate(names):
            number = 0
            for number, path in enumerate(images_below(folder / name, left_out), 1):  # noqa: B007
                yield _place(root, path, label)
            if not number:
                empty.append(name)
        if empty and folder.name != "val":
            fix = (
                f"class folders without an image: {', '.join(empty[:SHOWN])} ({len(empty)} in all); fill or remove them"
            )
            raise bad_value("data.root", str(root), f"{folder}: {fix}")
        if empty:
            to_stderr(printable(f"{folder}: no image of {len(empty)} classes: {', '.join(empty[:SHOWN])}"))

    places = Places.of(root, (), found())
    _say_what_is_left_out(folder, left_out)
    return places


def _flat(root: Path, folder: Path, labels: Path, names: list[str]) -> Places:
    """The images that lie in `folder` itself, with labels from a file."""
    left_out: list[str] = []
    paths = list(images_below(folder, left_out))
    _say_what_is_left_out(folder, left_out)
    found = read_labels(labels, [os.path.basename(path) for path in paths], names)
    rows = sorted(zip(found, paths, strict=True))  # as they would lie in class folders
    return Places.of(root, (), (_place(root, path, label) for label, path in rows))


def _place(root: Path, path: str, label: int) -> Place:
    try:
        stat = os.stat(path)
    except OSError:  # a link to nowhere: reading it will say so
        stat = os.lstat(path)
    return Place(path[len(os.path.join(root, "")) :], label, OWN_FILE, 0, stat.st_size, stat.st_mtime_ns)


def images_below(folder: Path, left_out: list[str]) -> Iterator[str]:
    """The files that are images by their names, folder by folder as torchvision sorts them."""
    for inner in sorted(map(str, _folders(folder, ()))):
        for name in sorted(entry.name for entry in _entries(inner) if not entry.is_dir()):
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS):
                yield os.path.join(inner, name)
            else:
                left_out.append(os.path.join(inner, name))


def _folders(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The folder and all below it, through links, but for one that lies in itself."""
    stat = folder.stat()
    identity = stat.st_dev, stat.st_ino
    if identity in above:
        to_stderr(printable(f"{folder} is a link to a folder that it lies in; it is left out"))
        return
    yield folder
    for entry in _entries(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _folders(folder / entry.name, (*above, identity))


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"data.root: {folder} cannot be read ({error.strerror})") from error


def _say_what_is_left_out(folder: Path, left: list[str]) -> None:
    """A warning that counts, by suffix, the files which torchvision does not take for images."""
    if left:
        kinds = Counter(os.path.splitext(path)[1] or "no suffix" for path in left)
        counted = ", ".join(f"{number} with {kind}" for kind, number in kinds.most_common(SHOWN))
        to_stderr(
            printable(f"{folder}: {len(left)} files are left out, not images by their names: {counted}; {left[0]}")
        )
