"""Does every evaluation image get the label that its file of labels gives it, and none a doubtful one?"""

from __future__ import annotations

from pathlib import Path

import pytest

from ghostmask.data_pipelines.photographs.val_labels import read_labels
from ghostmask.engine.errors import InputError

CLASSES = ["cat", "dog"]


def _labels(path: Path, text: str, images: list[str]) -> list[int]:
    path.write_text(text, encoding="utf-8")
    return read_labels(path, images, CLASSES)


def test_a_name_counts_before_its_stem(tmp_path: Path) -> None:
    text = "a.jpg cat\na.png dog\nb cat\nval/c.jpg dog\n"
    assert _labels(tmp_path / "x", text, ["a.jpg", "a.png", "b.jpg", "c.jpg"]) == [0, 1, 0, 1]


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path: Path) -> None:
    assert _labels(tmp_path / "x", "\ufeffa.jpg,dog\nb.jpg,cat\n", ["a.jpg", "b.jpg"]) == [1, 0]
    assert _labels(tmp_path / "x", "\ufeff1\n0\n", ["a.jpg", "b.jpg"]) == [1, 0]


@pytest.mark.parametrize(
    ("text", "images", "said"),
    [
        ("a.jpg cat\na.jpg dog\n", ["a.jpg"], "several labels for 1 images, such as a.jpg"),
        ("1/a.jpg cat\n2/a.jpg dog\n", ["a.jpg", "a.jpg"], "several labels for 2 images"),
        ("a.jpg cat\n", ["a.jpg", "a.jpg"], r"cannot tell images of the same name in several folders: a\.jpg"),
    ],
)
def test_a_label_that_may_be_another_images_is_refused(tmp_path: Path, text: str, images: list[str], said: str) -> None:
    with pytest.raises(InputError, match=rf"data\.val_labels = .*{said}"):
        _labels(tmp_path / "x", text, images)
