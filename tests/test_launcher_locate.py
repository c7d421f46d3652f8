"""Is a configuration found by name and by path, a run by name and by folder, and the nearest name offered else?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ghostmask.engine.errors import InputError
from ghostmask.launcher.locate import find_config, find_run, new_run_folder, shipped_configs, typed_path
from ghostmask.launcher.settings import load_config, run_folder


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


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("", "give the run a name"),
        ("  ", "give the run a name"),
        (".", "is no name of a run"),
        ("..", "is no name of a run"),
        ("./", "is the working directory"),
        ("../here/.", "is the working directory"),
        ("/", "holds the working directory"),
        ("../", "holds the working directory"),
        ("~/", "is the home folder"),
        ("link/", "is the working directory"),
        ("a\x1b[31mb", "holds a control character"),
        ("a\xa0b", "holds characters that cannot be seen"),
        ("x/\u200bb", "holds characters that cannot be seen"),
        ("a\tb", "holds a control character"),
        ("a\0b", "holds a NUL character"),
        ("a\udcffb", "is not UTF-8"),
        ("ä" * 128, "a name in it has 256 bytes; give at most 255"),
        ("x/" * 2000, "has 4000 bytes"),
        ("~nobody-of-that-name/x", "the home folder of the user nobody-of-that-name is not known; write ./~nobody"),
    ],
)
def test_a_run_never_lies_where_other_files_are_and_has_a_name_that_can_be_read(
    run: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    os.symlink(".", "link")
    with pytest.raises(InputError) as caught:
        run_folder(load_config(None, [f"run={run}"]))
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_names_that_are_only_unusual_are_taken() -> None:
    for run in ("ä" * 127, "-x", "a b", "...", "日本", "a=b", "./~x", "here/", "runs/x"):
        assert new_run_folder(typed_path("run", run)).name


def test_the_home_folder_is_meant_by_a_tilde_in_every_path_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {root: ~/data}\nmask: {method: file, path: '~/m.pt'}\nrun: ~/runs/x\n")
    config = load_config("~/mine.yaml")
    found = (config.data.root, config.mask.path, config.run)
    assert found == tuple(f"{tmp_path}/{name}" for name in ("data", "m.pt", "runs/x"))
    assert load_config(None, ["data.root=~/y"]).data.root == f"{tmp_path}/y"
    assert load_config(None, ["data.root=./~/y"]).data.root == "./~/y"
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("")
    assert find_run("~/r") == tmp_path / "r"
