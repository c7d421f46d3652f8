"""Does every name of a method lead to it, its page say what its file says, and a forgotten step end in a sentence?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from ghostmask.engine.errors import InputError
from ghostmask.launcher import methods
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.locate import shipped_configs
from ghostmask.launcher.method_page import method_page
from ghostmask.launcher.methods import method_of
from ghostmask.launcher.settings import load_config, settings_of
from ghostmask.masks.registry import METHODS

FORGOTTEN = {
    "no_such": "the registry names 'their.no_such:Foo', and there is no module their.no_such; write that file",
    "no_class": "defines no 'Foo'; correct one of them",
    "no_method": "the mask method 'their.no_method:Foo' is not a subclass of masks.method.MaskMethod; CONTRIBUTING.md",
    "no_form": "the mask method 'their.no_form:Foo' does not define reparametrization; CONTRIBUTING.md lists",
    "no_settings": "has Settings that are no subclass of masks.settings.MaskSettings; CONTRIBUTING.md lists",
}
"""What a contributor forgot -> what they are told."""

FILES = {
    "no_class": "Bar = 1",
    "no_method": "class Foo: pass",
    "no_form": "from ghostmask.masks.method import MaskMethod\nclass Foo(MaskMethod): pass",
    "no_settings": (
        "from ghostmask.masks.methods.dense import Dense\nclass Foo(Dense):\n    class Settings: density = 0.1"
    ),
}


@pytest.fixture(scope="module")
def their_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a contributor's package `their`, which stays as long as what was imported from it."""
    package = tmp_path_factory.mktemp("contributed") / "their"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in FILES.items():
        (package / f"{name}.py").write_text(text)
    return package.parent


@pytest.fixture
def their(their_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That package can be imported."""
    monkeypatch.syspath_prepend(their_folder)
    yield
    methods._complete.cache_clear()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("supermask", "'probmask' with mask.train_weights=false"),
        ("supermask", "'edge_popup'"),
        ("edge-popup", "'edge_popup'"),
        ("edgepopup", "'edge_popup'"),
        ("AC/DC", "'acdc'"),
        ("ST-3", "'st3'"),
        ("ST3-sigma", "'st3' with mask.sigma=true"),
        ("supermsk", "'probmask' with mask.train_weights=false"),
        ("imp", "'lth'"),
        ("lottery-ticket", "'lth'"),
        ("pbw", "'magnitude'"),
        ("prune", "'magnitude'"),
        ("mlp", "'mlprune'"),
        ("wanda", "'mlprune'"),
        ("ERK", "'random'"),
        ("Prob-Mask", "'probmask'"),
        ("magntude", "'magnitude'"),
        ("from_file", "'file'"),
        ("random_mask", "'random'"),
    ],
)
def test_another_name_leads_to_the_method(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        InputError, match=rf"^mask.method = '{typed}' is not known: did you mean .*{meant}.*\? known: "
    ) as caught:
        load_config("digits_magnitude", [f"mask.method={typed}"])
    meanings = str(caught.value).partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert len(meanings) == len(set(meanings))
    with pytest.raises(InputError, match=rf"^NAME = '{typed}' is not known: did you mean .*{meant}"):
        run_command(["show", "methods", typed])


def test_a_name_like_no_other_is_answered_with_all_names() -> None:
    with pytest.raises(InputError, match=rf"'qqqqq' is not known: known: {', '.join(sorted(METHODS))}$"):
        load_config(None, ["mask.method=qqqqq"])


@pytest.mark.parametrize("name", METHODS)
def test_a_page_says_what_the_methods_file_says(name: str) -> None:
    method, page = method_of(name), method_page(name)
    assert method.paper, "give the class `paper`: see CONTRIBUTING.md"
    assert page.startswith(f"{name}: ")
    assert " ".join(method.paper.split()) in " ".join(page.split())
    assert method.__doc__
    assert method.__doc__.strip().splitlines()[0] in page
    for field in fields(settings_of(name)):
        assert f"  mask.{field.name}=" in page or field.name == "method"
    mine = [config for config in shipped_configs() if load_config(config).mask.method == name]
    assert all(f"\n  {config}" in page for config in mine)


@pytest.mark.parametrize("name", METHODS)
def test_an_alias_is_no_methods_name_and_its_setting_is_one_that_is_read(name: str) -> None:
    for alias, _, setting in (text.partition(" ") for text in method_of(name).aliases):
        assert alias not in METHODS
        if setting:
            key, _, value = setting.partition("=")
            chosen = load_config(None, [f"mask.method={name}", setting])
            assert str(getattr(chosen.mask, key.removeprefix("mask."))).lower() == value


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_what_a_contributor_forgets_is_said_in_a_sentence(
    forgotten: str, their: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "foo", f"their.{forgotten}:Foo")
    with pytest.raises(InputError) as caught:
        load_config("digits_magnitude", ["mask.method=foo"])
    assert FORGOTTEN[forgotten] in str(caught.value)


def test_a_method_whose_line_in_the_registry_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", {name: entry for name, entry in METHODS.items() if name != "snip"})
    with pytest.raises(
        InputError, match=r"^mask.method = 'snip': there is masks/methods/snip.py, but no line of masks"
    ):
        load_config("digits_magnitude", ["mask.method=snip"])
