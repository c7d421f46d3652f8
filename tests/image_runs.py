"""Runs on a folder of small images, by ghostmask's own commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ghostmask.launcher.main import main

SETTINGS = [
    "data.dataset=imagefolder", "data.image_size=16", "data.num_workers=1", "data.batch_size=8", "model.name=conv4",
    "mask.method=magnitude", "mask.density=0.5", "train.epochs=2", "finetune.epochs=1", "train.threads=1",
    "train.log_every=1", "checkpoint.keep=9", "optim.lr=0.01", "seed=3",
]  # fmt: skip
"""Two classes of 8 images: 3 epochs of 2 steps."""


class Runs:
    """A folder with images, and commands on runs beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        (folder / "empty.yaml").touch()

    def pictures(self, first: int, count: int) -> None:
        draw = np.random.default_rng(first)
        for split in ("train", "val"):
            for label in range(2):
                place = self.images / split / f"class{label}"
                place.mkdir(parents=True, exist_ok=True)
                for i in range(first, first + count):
                    pixels = draw.integers(0, 128, (20, 20, 3)) + 100 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")

    def arguments(self, command: str, run: str = "run", *more: str) -> list[str]:
        given = [*SETTINGS, f"data.root={self.images}", f"run={self.folder / run}"]
        new = {item.partition("=")[0] for item in more}
        kept = [item for item in given if item.partition("=")[0] not in new]
        return [command, str(self.folder / "empty.yaml"), *kept, *more]

    def prepare(self) -> None:
        assert self.call("prepare") == 0

    def call(self, command: str, run: str = "run", *more: str) -> int:
        return main(self.arguments(command, run, *more))
