"""Can somebody add a mask method with one file and one line, and have its settings, checks, documents and runs?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from memory_run import CONFIG, Outcome, complete, configured

from ghostmask.engine.errors import InputError
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World
from ghostmask.launcher import show
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.settings import load_config, to_yaml
from ghostmask.masks.registry import METHODS

METHOD = '''
"""every: one weight in so many stays."""

from dataclasses import dataclass
from typing import Any

import torch

from ghostmask.engine.config import require_number
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.settings import MaskSettings


@dataclass(frozen=True)
class Settings(MaskSettings):
    """every."""

    every: int = 4
    """Of how many weights one stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("mask.every", self.every, 1)


class Every(MaskMethod):
    """Trains the first weight of every mask.every in each layer."""

    Settings = Settings

    @classmethod
    def check(cls, settings: Any, run: Any) -> None:
        if run.optim.clip:
            raise run.not_read("optim", "clip", "mask.method=every", "optim.clip=0")

    def reparametrization(self, phase):
        kept = {n: torch.arange(w.numel()) % self.settings.every == 0 for n, w in self.weights.items()}
        return FixedMask(self.rule(), {n: kept[n].view(w.shape) for n, w in self.weights.items()})
'''

ENTRY = "their_masks.every:Every"


@pytest.fixture(scope="module")
def their_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the contributor's package, which stays as long as what was imported from it."""
    folder = tmp_path_factory.mktemp("their")
    package = folder / "their_masks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "every.py").write_text(METHOD.lstrip())
    return folder


@pytest.fixture
def added(their_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder; their line stands in the registry."""
    monkeypatch.syspath_prepend(their_folder)
    monkeypatch.setitem(METHODS, "every", ENTRY)
    return their_folder


def test_its_settings_are_loaded_shown_and_checked(added: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, ["mask.method=every", "mask.every=8", "mask.dense_layers=[fc.weight]", "mask.density=1"])
    assert (config.mask.every, config.mask.dense_layers) == (8, ("fc.weight",))  # type: ignore[attr-defined]
    file = added / "resolved.yaml"
    file.write_text(to_yaml(config))
    assert load_config(str(file), ["run="]).mask == config.mask
    assert run_command(["show", "config", "mask.method=every"]) == 0
    shown = capsys.readouterr().out
    assert list(yaml.safe_load(shown)["mask"]) == ["method", "dense_layers", "only", "every"]
    assert "  # Of how many weights one stays.\n  every: 4\n" in shown
    assert ["every", "every: one weight in so many stays."] in [line.split(maxsplit=1) for line in show.methods()]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("mask.method=every mask.every=0", "mask.every = 0: give a number of at least 1"),
        ("mask.method=every mask.every=x", "mask.every = x: expected int"),
        ("mask.method=every mask.evry=2", "mask.evry is not a setting: did you mean mask.every?"),
        ("mask.method=every mask.density=0.1", "mask.density = 0.1: is not read with mask.method=every"),
        ("mask.method=every finetune.epochs=3", "finetune.epochs = 3: is not read with mask.method=every"),
        (
            "mask.method=every mask.lr=1",
            "mask.lr = 1.0: is not read with mask.method=every; leave it out, or use mask.m",
        ),
        (
            "mask.every=2",
            "mask.every = 2: is not read with mask.method=probmask; leave it out, or use mask.method=every",
        ),
        ("mask.method=evry", "mask.method = 'evry' is not known: did you mean 'every'?"),
        ("mask.method=every optim.clip=1", "optim.clip = 1.0: is not read with mask.method=every; leave it out"),
    ],
)
def test_what_is_wrong_with_its_settings_is_said_as_of_any_other(settings: str, said: str, added: Path) -> None:
    file = added / "theirs.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(InputError) as caught:
        run_command(["train", str(file), *settings.split()])
    assert str(caught.value).startswith(said)


def trained(world: World, folder: str, where: str, config: str) -> Outcome:
    """A run with the method in this rank's own process."""
    sys.path.insert(0, where)
    METHODS["every"] = ENTRY
    return complete(world, folder, load_config(config))


def test_it_trains_resumes_and_ends_equal_on_one_rank_and_on_two(added: Path) -> None:
    config: RunConfig = configured(CONFIG, optim={"clip": 0.0}, mask={"method": "every", "every": 10})
    file = added / "run.yaml"
    file.write_text(to_yaml(config))
    one = run_distributed(trained, 1, str(added / "one"), str(added), str(file))[0]
    two = run_distributed(trained, 2, str(added / "two"), str(added), str(file))
    again = run_distributed(trained, 2, str(added / "one"), str(added), str(file))
    assert again[0].resumed_at == 12
    assert {outcome.digest for outcome in (*two, *again)} == {one.digest}
    assert one.kept == sum(-(-mask.numel() // 10) for mask in one.masks.values())
