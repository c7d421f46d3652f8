"""ghostmask init: look at a folder of images, choose settings, write them with their reasons, and say what is next."""

from __future__ import annotations

import math
import shlex
import textwrap
from itertools import groupby
from pathlib import Path

from ghostmask.engine.atomic import replacing
from ghostmask.engine.errors import InputError, bad_value, output, printable
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.init.choose import UNBALANCED, Choice, choose
from ghostmask.launcher.init.look import Images, look
from ghostmask.launcher.settings import load_config
from ghostmask.launcher.values import as_text

WIDTH = 118


def init(folder: Path, out: Path | None) -> int:
    """Write the config and print where it is; returns 0. Raises InputError, also where `out` is there already."""
    images = look(folder)
    out = out or Path(f"{images.root.absolute().name or 'images'}.yaml")
    if str(out).startswith(("~", "-")):  # where it is typed, a home folder or an option
        out = out.absolute()
    if out.suffix not in (".yaml", ".yml"):
        raise bad_value("--out", str(out), "give a file ending in .yaml")
    if out.exists():
        raise bad_value("--out", str(out), "is there already; give another file")
    text = config_text(images, out)
    try:
        with replacing(out) as writing:
            writing.write_text(text, encoding="utf-8")
    except OSError as error:
        raise bad_value("--out", str(out), f"cannot be written ({error.strerror})") from None
    try:
        check_config(load_config(str(out)), world_size=1)
    except InputError as error:
        out.unlink()
        raise InputError(f"FOLDER = {str(folder)!r}: no config was found that fits ({error})") from None
    found = f"{images.num_train:,} images in {images.num_classes} classes"
    output(printable(f"{out}: {found}; next: ghostmask prepare {shlex.quote(str(out))}"))
    return 0


def config_text(images: Images, out: Path) -> str:
    """The YAML: what was seen, then each setting under its reason."""
    sections = groupby(choose(images), key=lambda choice: choice.name.partition(".")[0])
    return "\n".join([*_head(images, out), *(line for name, found in sections for line in _section(name, list(found)))])


def _head(images: Images, out: Path) -> list[str]:
    seen = (
        f"{images.num_train:,} training images in {images.num_classes} classes ({images.fewest:,} to {images.most:,} "
        f"each), {images.side} pixels on the shorter side (median), "
        f"{'with' if images.split else 'without'} images for evaluation."
    )
    notes = list(images.notes)
    if images.most > UNBALANCED * images.fewest:
        notes.append("The classes differ much in size: accuracy counts images, so look at the small ones by yourself.")
    lines = [f"A sparse network for {images.root.absolute()}: written by ghostmask init, to be changed at will.", ""]
    for text in (seen, *notes):
        lines += textwrap.wrap(text, WIDTH - 2)
    file = shlex.quote(str(out))
    lines += ["", f"next      ghostmask prepare {file} && ghostmask doctor {file} && ghostmask train {file}"]
    return [printable(f"# {line}").rstrip() for line in lines] + [""]


def _section(name: str, choices: list[Choice]) -> list[str]:
    lines = [f"{name}:"]
    for choice in choices:
        lines += [printable(f"  # {line}") for line in textwrap.wrap(choice.why, WIDTH - 4)]
        lines.append(f"  {choice.name.partition('.')[2]}: {_value(choice.value)}")
    return [*lines, ""] if name == "finetune" else lines


def _value(value: str | int | float | bool) -> str:
    assert not isinstance(value, float) or math.isfinite(value)
    return as_text(value)
