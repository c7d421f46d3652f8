"""How ImageNet becomes a dataset as it is downloaded: ILSVRC2012's tar files, read where they lie, nothing unpacked.

ROOT holds ILSVRC2012_img_train.tar (a tar file per class), ILSVRC2012_img_val.tar, and ILSVRC2012_devkit_t12.tar.gz,
which says what the validation images are (or a file of labels, data.val_labels). Classes are in torchvision's order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.photographs.places import Place, Places
from ghostmask.data_pipelines.photographs.stored import photographs
from ghostmask.data_pipelines.photographs.tar_files import Member, fingerprint_tars, members
from ghostmask.data_pipelines.photographs.val_labels import DEVKIT, devkit, read_labels
from ghostmask.data_pipelines.source import Source
from ghostmask.engine.errors import InputError, bad_value

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def imagenet(config: DataConfig) -> Source:
    """ILSVRC2012's tar files in ROOT as downloaded; 1,000 classes, side data.image_size (0 = 224)."""
    root = Path(config.root)
    train, val = root / TRAIN, root / VAL
    labels = Path(config.val_labels) if config.val_labels else root / DEVKIT
    absent = f"neither {TRAIN} nor a .beton is there; download it"

    @cache
    def classes() -> dict[str, Member]:
        if not train.is_file():
            raise bad_value("data.root", config.root, absent)
        found = sorted((Path(member.name).stem, member) for member in members(train) if member.name.endswith(".tar"))
        if len(found) < 2:
            raise bad_value("data.root", config.root, f"{train} holds no tar files of classes; download it again")
        return dict(found)

    def training() -> Places:
        def found() -> Iterator[Place]:
            for label, (wnid, archive) in enumerate(classes().items()):
                inner = sorted(members(train, archive))
                if not inner:
                    raise bad_value("data.root", config.root, f"{train}: {wnid}.tar holds no image; download it again")
                for member in inner:
                    yield Place(f"{wnid}/{member.name}", label, 0, member.offset, member.size, changed)

        changed = train.stat().st_mtime_ns
        return Places.of(root, (train,), found())

    def evaluation() -> Places:
        for path in (val, labels):
            if not path.is_file():
                fix = f"there is no {path}; download it (or give data.val_labels, or data.val_fraction without {VAL})"
                raise bad_value("data.root", config.root, fix)
        changed, found = val.stat().st_mtime_ns, sorted(members(val), key=lambda member: Path(member.name).name)
        names = [Path(member.name).name for member in found]
        numbers = read_labels(labels, names, list(classes()))
        rows = sorted(zip(numbers, names, found, strict=True))  # as they would lie in class folders
        return Places.of(root, (val,), (Place(n, label, 0, m.offset, m.size, changed) for label, n, m in rows))

    def words() -> dict[str, str]:
        if labels.name != DEVKIT or not labels.is_file():
            return {}
        try:
            return devkit(labels)[1]
        except InputError:  # nothing else is read of it then
            if not config.val_fraction:
                raise
            return {}

    def tars() -> list[Path]:
        return [path for path in (train, *([] if config.val_fraction else [val, labels])) if path.is_file()]

    return photographs(
        config,
        num_classes=len(classes()) if train.is_file() else 0,
        train=training,
        evaluation=evaluation if val.is_file() or not config.val_fraction else None,
        present=train.is_file,
        fingerprint=lambda: fingerprint_tars(tars()),
        class_names=lambda: list(classes()),
        class_words=words,
        absent=absent,
    )
