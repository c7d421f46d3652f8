"""Which class has an evaluation image that lies in no class folder: what a file of labels says, in its usual forms."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ghostmask.engine.errors import InputError, bad_value

FIELD = "data.val_labels"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def read_labels(path: Path, images: list[str], classes: list[str]) -> list[int]:
    """The label of each image (names without folders, in order), as an index into classes.

    Lines are "name label" (separated by white space, commas or tabs; what follows is ignored, as is a heading), or one
    label per image in the order of names. A label is a class's name, or its index where no class has a number for its
    name. ILSVRC2012's own numbers are understood in its devkit, packed or not. Raises InputError.
    """
    if path.name.endswith((".tar.gz", ".tgz")) or path.name == TRUTH:
        words = [[wnid] for wnid in devkit(path)[0]]
    else:
        words = [fields for line in _lines(path) if (fields := re.split(r"[,\s]+", line.strip())) != [""]]
    if all(len(fields) == 1 for fields in words):
        if len(words) != len(images):
            raise bad_value(FIELD, str(path), f"it has {len(words)} labels for {len(images)} images")
        return [_label(path, fields[0], classes) for fields in words]
    by_name: dict[str, set[str]] = {}
    for name, label in (fields[:2] for fields in words if len(fields) > 1):
        for known in {name, Path(name).stem}:
            by_name.setdefault(known, set()).add(label)
    found = [by_name.get(name) or by_name.get(Path(name).stem) or set() for name in images]
    numbers = np.array([len(some) for some in found], dtype=np.int64)
    for what, odd in (("no label", numbers == 0), ("several labels", numbers > 1)):
        if odd.any():
            first = images[int(odd.argmax())]
            raise bad_value(FIELD, str(path), f"it has {what} for {odd.sum()} images, such as {first}")
    twice = [name for name, number in Counter(images).items() if number > 1]
    if twice:
        raise bad_value(FIELD, str(path), f"it cannot tell images of the same name in several folders: {twice[0]}")
    return [_label(path, some.pop(), classes) for some in map(set, found)]


def devkit(path: Path) -> tuple[list[str], dict[str, str]]:
    """(class folder's name of each validation image in the order of names, name of a class folder -> the class in
    words). path: ILSVRC2012's devkit as downloaded, or its ground truth beside meta.mat. Raises InputError."""
    truth, meta = _from_devkit(path)
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
    except ImportError as error:
        fix = f"reading {META} needs scipy (extra [imagenet]); install it, or give lines of image and class"
        raise bad_value(FIELD, str(path), fix) from error
    try:
        synsets: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        return [wnids[int(line)] for line in truth.decode().split()], words
    except Exception as error:  # whatever is in place of the devkit's tables
        raise bad_value(FIELD, str(path), f"it is not ILSVRC2012's devkit ({error!r}); download it again") from error


def _from_devkit(path: Path) -> tuple[bytes, bytes]:
    try:
        if path.name == TRUTH:
            return path.read_bytes(), (path.parent / META).read_bytes()
        found = {}
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in (TRUTH, META) and (file := archive.extractfile(member)) is not None:
                    found[name] = file.read()
        return found[TRUTH], found[META]
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise bad_value(FIELD, str(path), f"it cannot be read ({error}); download {DEVKIT} again") from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        raise bad_value(FIELD, str(path), f"it cannot be read ({error.strerror})") from error


def _label(path: Path, word: str, classes: list[str]) -> int:
    if word in classes:
        return classes.index(word)
    if word.isdecimal() and int(word) < len(classes) and not any(name.isdecimal() for name in classes):
        return int(word)
    raise InputError(f"{FIELD} = {str(path)!r}: {word} is neither a class folder's name nor an index of one")
