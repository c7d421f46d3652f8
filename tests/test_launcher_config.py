"""Does every way to write a setting end in the right RunConfig, or in one line that says what is wrong with it?"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ghostmask.engine.errors import InputError
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.locate import shipped_configs
from ghostmask.launcher.settings import (
    GONE,
    differences,
    field_docs,
    from_dict,
    load_config,
    run_folder,
    setting_types,
    settings_of,
    to_dict,
    to_yaml,
)
from ghostmask.masks.registry import METHODS
from ghostmask.masks.settings import FromTrained, MaskSettings, Ranked
from ghostmask.models.config import TostConfig

GIVEN = {"file": ["mask.path=mask.pt"]}
"""Settings without which a method's configuration is none."""


def default_of(method: str) -> RunConfig:
    return load_config(None, ["run=some", f"mask.method={method}", *GIVEN.get(method, [])])


def write(folder: Path, text: str) -> str:
    file = folder / "some.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def error_of(path: str | None, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_give_way_to_yaml_and_yaml_to_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "mask: {density: 0.2, samples: 3}\noptim: {lr: 0.3}\n")
    config = load_config(path, ["mask.density=0.05", "optim.schedule=step", "optim.milestones=[90,135]"])
    assert (config.mask.density, config.mask.samples, config.optim.lr) == (0.05, 3, 0.3)
    assert (config.optim.milestones, config.optim.momentum) == ((90, 135), RunConfig().optim.momentum)


def test_numbers_follow_yaml_1_2_in_files_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "mask: {lr: 6e-3}\noptim: {lr: 1, weight_decay: 5.0e-04}\nseed: 010\n")
    config = load_config(path, ["finetune.lr=1e-4", "optim.clip=.5"])
    assert (config.mask.lr, config.optim.lr, config.optim.weight_decay) == (0.006, 1.0, 0.0005)
    assert (config.finetune.lr, config.optim.clip, config.seed) == (0.0001, 0.5, 10)
    assert type(config.optim.lr) is float


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=1e3", "train.epochs = 1e3: expected int"),
        ("train.epochs=3.0", "train.epochs = 3.0: expected int"),
        ("train.epochs=", "train.epochs = (nothing): expected int"),
        ("mask.density=abc", "mask.density = abc: expected float"),
        ("mask.density='0.1'", "mask.density = '0.1': expected float"),
        ("mask.density=true", "mask.density = true: expected float"),
        ("mask.density=[0.1]", "mask.density = [0.1]: expected float"),
        ("mask.density=nan", "mask.density = nan: expected float"),
        ("mask.density=.nan", "mask.density = nan: give a number in (0, 1]"),
        ("mask.density=1e999", "mask.density = inf: give a number in (0, 1]"),
        ("data.augment=yes", "data.augment = yes: expected bool (true or false)"),
        ("data.augment=1", "data.augment = 1: expected bool (true or false)"),
        ("data.augment=True", "data.augment = True: expected bool (true or false)"),
        ("optim.milestones=90", "optim.milestones = 90: expected a list of int"),
        ("optim.milestones=[90,x]", "optim.milestones[1] = x: expected int"),
        ("mask.dense_layers=fc.weight", "mask.dense_layers = fc.weight: expected a list of str"),
        ("optim.milestones=[90", "optim.milestones=[90: expected ',' or ']'"),
        ("run=null", "run = null: expected str"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_type(override: str, expected: str) -> None:
    assert error_of(None, override).startswith(expected)


@pytest.mark.parametrize(
    ("override", "value"), [("5", "5"), ("1e3", "1e3"), ("a: b", "a: b"), ('"null"', "null"), ("[x", "[x"), ("", "")]
)
def test_a_text_setting_takes_the_override_as_it_stands(override: str, value: str) -> None:
    assert load_config(None, ["mask.method=snip", f"mask.path={override}"]).mask.path == value


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("mask.densty=0.1", "mask.densty is not a setting: did you mean mask.density?"),
        ("density=0.1", "density is not a setting: did you mean mask.density?"),
        ("lr=0.1", "lr is not a setting: did you mean mask.lr or optim.lr or finetune.lr?"),
        ("train.batch_size=8", "train.batch_size is not a setting: did you mean data.batch_size?"),
        ("mask.density.x=1", "mask.density.x is not a setting: did you mean mask.density?"),
        ("zzz=1", "zzz is not a setting: known: run, seed, model, data, mask,"),
        ("=1", " is not a setting: known: run, seed, model,"),
        ("mask=probmask", "mask = probmask: is a section; give its settings, such as mask.method"),
        ("restart", "restart: give settings as key=value"),
        ("mask.method=[a]", "mask.method = '[a]' is not known: known: "),
        ("mask.method=probmsk", "mask.method = 'probmsk' is not known: did you mean 'probmask'?"),
    ],
)
def test_an_unknown_override_is_answered_with_the_nearest_setting(override: str, hint: str) -> None:
    assert error_of(None, override).startswith(hint)


def test_tost_takes_all_or_none_and_its_settings_on_top(tmp_path: Path) -> None:
    every = TostConfig(ghost_skip=True, ghost_swish=True, label_smoothing=0.1, lrsi=True)
    assert load_config(None, ["tost=all"]).tost == load_config(write(tmp_path, "tost: all\n"), []).tost == every
    without = replace(every, lrsi=False, lrsi_eta=0.2)
    assert load_config(None, ["tost.lrsi=false", "tost=all", "tost.lrsi_eta=0.2"]).tost == without
    file = write(tmp_path, "tost: {lrsi_eta: 0.2, ghost_skip: true}\n")
    assert load_config(file, ["tost=all", "tost.lrsi=false"]).tost == without
    assert (
        load_config(file, ["tost=none"]).tost == load_config(write(tmp_path, "tost: none\n"), []).tost == TostConfig()
    )
    assert load_config(write(tmp_path, "tost: all\n"), ["tost.lrsi=false"]).tost == replace(every, lrsi=False)
    assert "tost = some: is a section; give its settings, such as tost.ghost_skip, or all or none" in error_of(
        None, "tost=some"
    )
    assert "tost = true: is a section" in error_of(write(tmp_path, "tost: true\n"))


def test_a_setting_given_twice_is_an_error(tmp_path: Path) -> None:
    assert "mask.density is given twice" in error_of(None, "mask.density=0.1", "mask.density=0.2")
    path = write(tmp_path, "mask:\n  density: 0.1\n  lr: 1\n  density: 0.2\n")
    assert error_of(path) == f"{path}:4: density is given twice, first in line 2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mask: {density: 0.1}\nmaks: {}\n", "maks is not a setting: "),
        ("mask:\n  densty: 0.1\n", "mask.densty is not a setting: did you mean mask.density?"),
        ("mask.density: 0.1\n", "mask.density is not a key of a YAML file: write density: below mask:"),
        ("mask: 0.1\n", "mask = 0.1: is a section"),
        ("mask:\n", "mask = (nothing): is a section"),
        ("mask: [method]\n", "mask = [method]: is a section"),
        ("run:\n", "run = (nothing): expected str"),
        ("- a\n", "FILE: give settings as `key: value` lines"),
        ("mask:\n  density: 0.1\n lr: 1\n", "FILE:3: "),
        ("mask: {density: 0.1\n", "FILE:2: "),
        ("mask:\n\tdensity: 1\n", "FILE:2: "),
        ("seed: !!python/object:os.system 1\n", "FILE:1: tags such as !!python/object:os.system are not read here"),
        ("seed: 1\x07\n", "FILE:1: holds an invisible character (U+0007)"),
        ("seed: &a [*a]\n", "FILE:1: the alias *a stands inside of what it names"),
        ("? [a]\n: 1\n", "FILE:1: found unhashable key"),
    ],
)
def test_a_wrong_file_is_answered_with_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    assert error_of(path).startswith(expected.replace("FILE", path))


def test_a_file_that_is_not_text_is_answered_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert error_of(str(file)) == f"{file}: is UTF-16; save it as UTF-8"


def test_an_override_into_a_section_that_the_file_made_a_scalar_is_an_error(tmp_path: Path) -> None:
    assert "mask = 5: is a section" in error_of(write(tmp_path, "mask: 5\n"), "mask.density=0.1")


def test_an_empty_file_is_the_defaults_under_the_files_name(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "# nothing\n"))
    assert config == replace(load_config(None), run="some")
    assert replace(config, mask=MaskSettings()) == replace(RunConfig(), run="some")
    assert config.mask == settings_of(RunConfig().mask.method)()


def test_the_run_is_named_after_its_file_unless_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\n")
    assert str(run_folder(load_config(path))) == "runs/some"
    assert str(run_folder(load_config(path, ["run=other"]))) == "runs/other"
    assert str(run_folder(load_config(path, ["run=/scratch/other"]))) == "/scratch/other"
    with pytest.raises(InputError, match="run = ''"):
        run_folder(RunConfig())


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_and_fits_together(name: str) -> None:
    config = load_config(name)
    assert config.run == name
    check_config(config, world_size=4)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_opens_with_paper_cost_accuracy_and_command(name: str) -> None:
    head = shipped_configs()[name].read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    words = [line.split()[1] for line in head[2:] if len(line.split()) > 1]
    assert [word for word in words if word in ("paper", "cost", "accuracy", "command")] == [
        "paper", "cost", "accuracy", "command",
    ]  # fmt: skip
    assert f"train {name}" in next(line for line in head if line.startswith("# command"))
    if "imagenet" in name:
        assert "hardware" in words
        assert "reckoned, not measured here: " in "\n".join(head)


@pytest.mark.parametrize("name", [*shipped_configs(), *METHODS])
def test_a_resolved_config_is_read_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(name) if name in shipped_configs() else default_of(name)
    text = to_yaml(config)
    assert load_config(write(tmp_path, text)) == config
    assert from_dict(to_dict(config)) == config
    assert yaml.safe_load(text) == to_dict(config)


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_config_lists_exactly_what_the_method_reads_each_with_its_meaning(method: str) -> None:
    text = to_yaml(default_of(method))
    assert list(yaml.safe_load(text)["mask"]) == [field.name for field in fields(settings_of(method))]
    sections: list[Any] = [RunConfig, settings_of(method)]
    sections += [kind for kind in setting_types().values() if is_dataclass(kind) and kind is not MaskSettings]
    for section in sections:
        docs, types = field_docs(section), setting_types(section)
        for name in (field.name for field in fields(section) if not is_dataclass(types[field.name])):
            assert f"# {docs[name].splitlines()[0]}\n" in text, name


@dataclass(frozen=True)
class Redescribed(Ranked, FromTrained):
    constraint: str = "layerwise"
    """Said anew."""


def test_a_setting_that_is_described_anew_goes_before_what_is_inherited() -> None:
    docs, inherited = field_docs(Redescribed), field_docs(Ranked)
    assert docs.pop("constraint") == "Said anew."
    assert docs == {**field_docs(FromTrained), **{n: d for n, d in inherited.items() if n != "constraint"}}


@pytest.mark.parametrize("path", ["", "null", "1e3", "5", "true", "a: b", "#x", "ü\xa0", "'\"", "~/x y", "-", "1.5"])
def test_any_text_and_number_survives_being_written(path: str, tmp_path: Path) -> None:
    config = from_dict(
        {
            "mask": {"method": "mlprune", "path": path, "dense_layers": [path, "fc.*", "ü\n\t\x7f"], "damping": 1e-7},
            "optim": {"weight_decay": 1e-22},
            "run": "r",
        }
    )
    text = to_yaml(config)
    assert load_config(write(tmp_path, text)) == config
    assert yaml.safe_load(text) == to_dict(config)


def test_every_setting_has_a_type_that_can_be_written_in_yaml_the_same_in_every_method() -> None:
    known = setting_types()
    for key, kind in known.items():
        scalar = get_args(kind)[0] if get_args(kind) else kind
        assert is_dataclass(kind) or scalar in (int, float, bool, str), key
    for method in METHODS:
        for name, kind in setting_types(settings_of(method)).items():
            assert kind == known[f"mask.{name}"], f"mask.{name} of {method}"


def test_a_setting_of_an_earlier_version_is_answered_with_what_does_its_work_now(tmp_path: Path) -> None:
    known = setting_types()
    for name, now in GONE.items():
        section, _, key = name.partition(".")
        assert name not in known
        assert re.split("[=,]", now)[0] in known
        said = f"{name} is not a setting any more: give {now}; see ghostmask show config"
        assert error_of(None, f"{name}=1") == error_of(write(tmp_path, f"{section}: {{{key}: 1}}\n")) == said


def test_differences_name_old_and_new_values_but_not_what_may_change() -> None:
    old = load_config("cifar10_resnet32_probmask")
    changed = ["mask.density=0.1", "mask.dense_layers=[fc.weight]", "data.num_workers=7", "train.zero_stage=2", "run=x"]
    new = load_config("cifar10_resnet32_probmask", changed)
    assert differences(old, new) == [
        "mask.dense_layers: [] in the run folder, [fc.weight] given",
        "mask.density: 0.05 in the run folder, 0.1 given",
    ]
    assert differences(old, old) == []
    gmp = load_config("cifar10_resnet32_gmp", ["optim.clip=3", "mask.density=0.1", "finetune.epochs=20"])
    assert differences(old, gmp) == [
        "mask.method: probmask in the run folder, gmp given", "mask.density: 0.05 in the run folder, 0.1 given",
    ]  # fmt: skip
