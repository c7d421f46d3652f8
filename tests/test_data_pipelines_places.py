"""Which images are drawn for evaluation?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ghostmask.data_pipelines.photographs.places import OWN_FILE, Place, Places, split_off


def test_a_share_of_each_class_is_drawn_but_never_all() -> None:
    numbers = np.random.default_rng(0).integers(1, 9, 5000)
    labels = np.repeat(np.arange(0, 10_000, 2), numbers)
    of = (Place(f"{label}/{k}.jpg", int(label), OWN_FILE, 0, 1, 1) for k, label in enumerate(labels))
    places = Places.of(Path("root"), (), of)
    train, evaluation = split_off(places, 0.3, 0)
    expected = [min(max(1, round(0.3 * int(number))), int(number) - 1) for number in numbers]
    assert np.bincount(evaluation.labels, minlength=10_000)[::2].tolist() == expected
    names = {some.name(i) for some in (train, evaluation) for i in range(len(some))}
    assert len(names) == len(train) + len(evaluation) == len(places)
