"""How WebDataset's shards become a dataset: tar files of NAME.jpg with NAME.cls or NAME.json, read where they lie.

ROOT/train/*.tar and ROOT/val/*.tar, or ROOT/*train*.tar and ROOT/*val*.tar; the shards are in the order of their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.photographs.places import Place, Places
from ghostmask.data_pipelines.photographs.stored import photographs
from ghostmask.data_pipelines.photographs.tar_files import Member, fingerprint_tars, members
from ghostmask.data_pipelines.source import Source
from ghostmask.engine.errors import InputError, bad_value

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json")
JSON_KEYS = ("label", "cls", "class_id")
"""Where a .json has the number of its class."""
MOST_CLASSES = 100_000


def webdataset(config: DataConfig) -> Source:
    """Shards of .jpg, .png or .webp with .cls or .json (label); side data.image_size (0 = 224)."""
    root = Path(config.root)
    train, val = shards_of(root, "train"), shards_of(root, "val")
    if both := [shard.name for shard in train if shard in val]:
        fix = f"{both[0]} has train and val in its name; put the shards into folders, train and val"
        raise bad_value("data.root", config.root, fix)

    def places(shards: list[Path], split: str) -> Places:
        if not shards:
            fix = f"no {split}/*.tar and no *{split}*.tar there; give the folder of the shards, or data.val_fraction"
            raise bad_value("data.root", config.root, fix)
        found = Places.of(root, shards, (p for at, shard in enumerate(shards) for p in samples(shard, at)))
        if not len(found):
            raise bad_value("data.root", config.root, f"the shards of {split} hold no image, {shards[0].name} is one")
        return found

    return photographs(
        config,
        num_classes=0,
        train=lambda: places(train, "train"),
        evaluation=(lambda: places(val, "val")) if val or not config.val_fraction else None,
        present=lambda: bool(train),
        fingerprint=lambda: fingerprint_tars([*train, *val]),
        absent="no .beton there, which says how many classes there are; run `ghostmask prepare CONFIG`",
    )


def shards_of(root: Path, split: str) -> list[Path]:
    """The split's tar files, in their order."""
    found = (sorted(root.glob(pattern)) for pattern in (f"{split}/*.tar", f"*{split}*.tar"))
    return next((shown for some in found if (shown := [p for p in some if not p.name.startswith(".")])), [])


def samples(shard: Path, number: int) -> Iterator[Place]:
    """The samples of a shard, in its order. Raises InputError for one without an image or a label."""
    changed = shard.stat().st_mtime_ns
    samples: dict[str, dict[str, Member]] = {}
    for member in members(shard):
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        parts = samples.setdefault(f"{folder}/{key}" if folder else key, {})
        if extension.lower() in parts:  # one of two samples would be lost
            raise InputError(f"data.root: {shard}: {member.name} is there twice; write it anew")
        parts[extension.lower()] = member
    with open(shard, "rb") as file:
        for key, parts in samples.items():
            image = next((parts[kind] for kind in IMAGES if kind in parts), None)
            label = next((parts[kind] for kind in LABELS if kind in parts), None)
            if image is None or label is None:
                lacks = f"one of {', '.join(IMAGES)}" if image is None else "one of .cls, .json"
                raise InputError(f"data.root: {shard}: {key} has {', '.join(parts)}, and not {lacks}; write it anew")
            file.seek(label.offset)
            number_of_class = _class(shard, label.name, file.read(label.size))
            yield Place(image.name, number_of_class, number, image.offset, image.size, changed)


def _class(shard: Path, name: str, text: bytes) -> int:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            value = next(value[key] for key in JSON_KEYS if key in value)
        if type(value) is int and 0 <= value < MOST_CLASSES:
            return value
    except (ValueError, StopIteration):
        pass
    fix = f"give the number of a class, 0 ... {MOST_CLASSES - 1:,}, by itself or as {JSON_KEYS[0]!r}"
    raise InputError(f"data.root: {shard}: {name} holds {text[:50]!r}: {fix}")
