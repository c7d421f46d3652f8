"""Is a configuration found by name and by path, a run by name and by folder, and the nearest name offered else?"""

from __future__ import annotations

from pathlib import Path

import pytest

from ghostmask.engine.errors import InputError
from ghostmask.launcher.locate import find_config, find_run, shipped_configs
from ghostmask.launcher.settings import load_config


def test_a_shipped_config_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "cifar10_resnet32_probmask"
    expected = shipped_configs()[name]
    assert {find_config(text) for text in (name, f"{name}.yaml", f"configs/{name}.yaml")} == {expected}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / f"{name}.yaml").write_text("seed: 7\n")
    assert load_config(name).seed == 7


def test_an_unknown_config_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'cifar10_resnet32_probmask'\?"):
        find_config("cifar10_resnet32_probmsk")
    with pytest.raises(InputError, match="there is no such file"):
        find_config(str(tmp_path / "absent.yaml"))
    with pytest.raises(InputError, match="is a folder; give a YAML file"):
        find_config(str(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=f"is a folder; give the file {tmp_path / 'config.yaml'}"):
        find_config(str(tmp_path))


def test_a_run_is_found_by_name_and_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no run in runs/"):
        find_run("first")
    for folder in ("runs/first", "elsewhere/second", "here"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text("")
    assert find_run("first") == find_run("runs/first") == Path("runs/first")
    assert find_run("here") == Path("here")
    assert find_run(str(tmp_path / "elsewhere/second")) == tmp_path / "elsewhere/second"
    with pytest.raises(InputError, match="did you mean 'first'"):
        find_run("frist")
    with pytest.raises(InputError, match="did you mean 'elsewhere/second'"):
        find_run("elsewhere/secnd")
    (tmp_path / "runs" / "empty").mkdir()
    with pytest.raises(InputError, match=r"it holds no config\.yaml"):
        find_run("empty")
