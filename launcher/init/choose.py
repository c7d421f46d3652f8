"""Which settings fit a set of images, and why: rules of thumb, each with the reason that is written beside it."""

from __future__ import annotations

from dataclasses import dataclass

from ghostmask.launcher.init.look import Images

SIDES = (16, 32, 64, 96, 128, 160, 224)
RAW_BYTES = 8e9
"""A .beton of raw pixels up to this size is read faster than it is decoded, and fits into memory."""
VAL_FRACTION = 0.1
STEPS = 32
"""That an epoch should have at least, if the batch can be made small enough."""
UNBALANCED = 10
"""Times that the largest class may be larger than the smallest before it is said."""


@dataclass(frozen=True)
class Choice:
    """A setting, its value as YAML has it, and the reason."""

    name: str
    value: str | int | float | bool
    why: str


def choose(images: Images) -> list[Choice]:
    """The settings, section by section, in the order of their writing."""
    size = image_side(images.side)
    num_train = round(images.num_train * (1 if images.split else 1 - VAL_FRACTION))
    batch = batch_size(num_train)
    return [*_model(images, size, num_train), *_data(images, size, batch), *_recipe(images, num_train, batch)]


def image_side(side: int) -> int:
    """The largest usual side that the images reach, or nearly: enlarging them adds work and no detail."""
    return max((usual for usual in SIDES if usual <= side * 1.15), default=SIDES[0])


def batch_size(num_train: int) -> int:
    """A power of two up to 256 with which an epoch has STEPS steps; for few images what leaves a few."""
    few = max(2, min(8, num_train // 4))
    return next((size for size in (256, 128, 64, 32, 16) if num_train >= STEPS * size), few)


def epochs_for(num_train: int) -> int:
    """Fewer for more images: what counts is how many are seen."""
    return next(epochs for least, epochs in ((10**6, 100), (10**5, 120), (10**4, 200), (0, 300)) if num_train >= least)


def _model(images: Images, size: int, num_train: int) -> list[Choice]:
    if size >= 96:
        name = "resnet50" if num_train >= 100_000 else "resnet18"
        why = f"{size} pixels: a network whose stem shrinks; {num_train:,} images {_enough(name == 'resnet50')}"
    elif size >= 64:
        name, why = "resnet18_cifar", f"{size} pixels: a network whose stem does not shrink"
    else:
        name = "resnet32" if num_train >= 10_000 else "resnet20"
        why = f"{size} pixels: a network for small images; {num_train:,} images {_enough(name == 'resnet32')}"
    return [Choice("model.name", name, why)]


def _enough(large: bool) -> str:
    return "are enough for the larger one" if large else "are few for a larger one"


def _data(images: Images, size: int, batch: int) -> list[Choice]:
    found = [
        Choice("data.dataset", images.dataset, f"{images.num_train:,} training images, {images.num_classes} classes")
    ]
    found.append(Choice("data.root", str(images.root.absolute()), "the .beton files go to its folder beton/"))
    found.append(
        Choice("data.batch_size", batch, f"about {images.num_train // batch:,} steps per epoch; optim.lr goes with it")
    )
    if images.dataset.startswith("cifar"):
        return found
    found.append(Choice("data.image_size", size, f"the images' median shorter side is {images.side}"))
    longest = min(512, max(size, images.side))
    found.append(Choice("data.max_resolution", longest, "larger images are shrunk when they are written"))
    shrink = min(1.0, longest / images.side)
    raw = images.num_train * images.pixels * 3 * shrink**2
    if raw <= RAW_BYTES:
        found.append(Choice("data.jpeg_fraction", 0, f"all raw, which is read fastest: {raw / 1e9:.2g} GB"))
    else:
        found.append(Choice("data.jpeg_fraction", 0.5, f"half of them JPEG: all raw would be {raw / 1e9:.3g} GB"))
    if images.labels:
        found.append(
            Choice("data.val_labels", str(images.labels.absolute()), "val/ has no class folders: this file says")
        )
    if not images.split:
        found.append(
            Choice(
                "data.val_fraction", VAL_FRACTION, "there are no images for evaluation: a share of each class, by seed"
            )
        )
    return found


def _recipe(images: Images, num_train: int, batch: int) -> list[Choice]:
    epochs, large = epochs_for(num_train), num_train >= 100_000
    steps = epochs * (num_train // batch)
    found = [
        Choice("mask.method", "probmask", "ghostmask show methods lists the others"),
        Choice("mask.density", 0.1, "a tenth of the weights stays: your choice; try 0.05 and 0.02 too"),
        Choice("mask.samples", 1 if large else 2, "each sample costs a forward and backward pass per step"),
        Choice("optim.lr", round(0.1 * batch / 256, 6), f"0.1 for a batch of 256, in proportion to {batch}"),
        Choice("optim.weight_decay", 5e-5 if large else 5e-4, "less for more images, which overfit less"),
        Choice("optim.clip", 3.0, "ProbMask's authors clip weights and probabilities together"),
        Choice("optim.warmup", "5ep" if large else "1ep", "large first steps harm"),
        Choice("train.epochs", epochs, f"{steps:,} steps; mask.lr is derived from their number"),
        Choice("finetune.epochs", max(1, epochs // 10), "the weights that stay, under the mask that was found"),
        Choice("finetune.lr", round(0.01 * batch / 256, 6), "a tenth of optim.lr"),
        Choice("finetune.schedule", "cosine", "ends at 0"),
    ]
    if large:
        found.insert(-4, Choice("train.precision", "bf16", "on a GPU nearly twice as fast; drop it on a CPU"))
    smoothing = Choice("tost.label_smoothing", 0.1, "many classes, or many images")
    return [smoothing, *found] if large or images.num_classes >= 100 else found
