"""What does a run folder say of its run, and may a command go on with it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostmask.engine.errors import InputError
from ghostmask.launcher.checks import check_data
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.settings import GONE, differences, from_dict, load_config, run_folder
from ghostmask.launcher.yaml_text import read_yaml_file

if TYPE_CHECKING:
    from ghostmask.engine.checkpoint.store import Saved


def read_run(folder: Path) -> RunConfig:
    """The configuration of the run in `folder`. Raises InputError; of a run of an older version it says that it is."""
    file = folder / "config.yaml"
    try:
        return load_config(str(file))
    except InputError as error:
        old = _gone(file)
        if old:
            raise older(folder, f"{old} in its config.yaml") from None
        fix = "restore it, or delete it (the checkpoints hold it too), or give another run=NAME"
        raise InputError(f"run = {str(folder)!r}: its configuration cannot be read ({error}); {fix}") from None


def other_data(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of the run in `folder`, with other data where `overrides` (data.key=value) name some.

    Raises InputError for settings of anything else, and of data that this data set does not read.
    """
    before = read_run(folder)
    for item in overrides:
        if not item.startswith(("data.", "train.device=")):
            fix = "give settings of data, such as data.root=/other, or train.device: the network is what it is"
            raise InputError(f"{item}: is not read by evaluate; {fix}")
    if not overrides:
        return before
    config = load_config(str(folder / "config.yaml"), overrides)
    check_data(config)
    return config


def networks(config: RunConfig) -> set[str]:
    """Names of the networks that a run builds: its own, and its teacher's. Raises InputError as read_run does."""
    names = {config.model.name, config.distill.model or config.model.name}
    teacher = Path(config.distill.path)
    if config.distill.path and not config.distill.model and (teacher / "config.yaml").is_file():
        names.add(read_run(teacher).model.name)
    return names


def resumed(config: RunConfig, *, restart: bool = False) -> RunConfig:
    """`config`, with the parts of a batch that the run in its folder is cut into where it says nothing of them.

    Where there is nothing to go on with, and with restart, `config` as it is. Raises InputError where the run was
    started with other settings. A first look: `check_saved` is the one that trusts checksums.
    """
    folder = run_folder(config)
    if restart or not any((folder / "checkpoints").glob("step-*")):
        return config
    before = read_run(folder) if (folder / "config.yaml").exists() else _newest_config(folder)
    if before is None:
        return config
    if not config.train.replicas:
        config = replace(config, train=replace(config.train, replicas=before.train.replicas))
    changes = differences(before, config)
    if changes:
        raise InputError(
            f"run = {str(folder)!r}: the run folder holds another configuration ({'; '.join(changes)}); give another "
            f"run=NAME, --restart to start over, or --from {folder} with another run=NAME to go on from it"
        )
    return config


def check_saved(folder: Path, saved: Saved, config: RunConfig) -> None:
    """Raise InputError unless `saved`, a checkpoint of the run in `folder`, is one of this configuration: the
    checkpoint is sealed, config.yaml is not."""
    changes = differences(sealed_config(folder, saved.meta), config)
    if changes:
        raise InputError(
            f"run = {str(folder)!r}: {saved.path.name} was made with another configuration than config.yaml says now "
            f"({'; '.join(changes)}); delete config.yaml to have it written from the checkpoint, or give another "
            "run=NAME"
        )


def data_changes(saved: Saved, identity: Mapping[str, int | str]) -> list[str]:
    """What differs between the data that a checkpoint was made with and those there are now, in words."""
    before: dict[str, Any] = saved.meta.get("data", {})
    return [f"{name}: {before.get(name)} before, {value} now" for name, value in identity.items() if before.get(name)
            != value]  # fmt: skip


def sealed_config(folder: Path, meta: Mapping[str, Any]) -> RunConfig:
    """The configuration that a checkpoint's meta holds. Raises InputError where this version does not know it."""
    try:
        return from_dict(meta["config"])
    except (InputError, KeyError, TypeError) as error:
        raise older(folder, f"its checkpoints hold other settings: {error}") from None


def older(folder: Path, sign: str) -> InputError:
    """The error for a run that this version cannot go on with; sign: what shows it."""
    return InputError(
        f"run = {str(folder)!r}: was made by an older version of ghostmask ({sign}), whose checkpoints this one does "
        "not read; give another run=NAME, or move the folder away"
    )


def _newest_config(folder: Path) -> RunConfig | None:
    """What the newest sealed checkpoint says of the run's configuration; None where there is none."""
    from ghostmask.launcher.record import sealed_meta  # imports torch's checkpoints, which most commands do without

    meta = sealed_meta(folder)
    return sealed_config(folder, meta) if meta else None


def _gone(file: Path) -> str:
    """The first setting of older versions that stands in a config file, with its value; "" where none does."""
    try:
        values = read_yaml_file(file)
    except InputError:
        return ""
    for name in GONE:
        section, _, key = name.partition(".")
        if isinstance(values, dict) and isinstance(values.get(section), dict) and key in values[section]:
            return name
    return ""
