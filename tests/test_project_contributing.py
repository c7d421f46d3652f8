"""Is the method that CONTRIBUTING.md shows, as short as it is, one that trains?"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from memory_run import CONFIG, Outcome, complete, configured

from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.masks.registry import METHODS
from ghostmask.masks.scoring.topk import kept_count

HEAD = '''"""dnw: the largest |w| of every layer, the gradient goes to all."""

from dataclasses import dataclass

import torch

from ghostmask.masks.settings import Protecting
from ghostmask.masks.straight_through import CutEveryStep, StraightThrough


@dataclass(frozen=True)
class Settings(Protecting):
    """dnw."""


'''


def trained(world: World, folder: str, package: str, config: RunConfig) -> Outcome:
    sys.path.insert(0, package)
    METHODS["dnw"] = "shown_masks.dnw:Dnw"
    return complete(world, folder, config)


def test_the_method_shown_trains_the_same_masks_on_one_rank_and_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
    (shown,) = re.findall(r"```python\n(class Largest.*?)```", text, flags=re.S)
    package = tmp_path / "shown_masks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "dnw.py").write_text(HEAD + shown)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "dnw", "shown_masks.dnw:Dnw")
    config = configured(CONFIG, mask={"method": "dnw", "constraint": "layerwise"})
    outcomes = [
        run_distributed(trained, ranks, str(tmp_path / f"on{ranks}"), str(tmp_path), config)[0] for ranks in (1, 2)
    ]
    assert outcomes[0].digest == outcomes[1].digest
    for mask in outcomes[0].masks.values():
        assert int(mask.sum()) == kept_count(0.1, mask.numel())
