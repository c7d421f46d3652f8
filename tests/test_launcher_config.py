"""Does every way to write a setting end in the right RunConfig, or in one line that says what is wrong with it?"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ghostmask.engine.errors import InputError
from ghostmask.engine.registry import resolve
from ghostmask.launcher.checks import FINETUNED, READ_BY_METHOD, check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.locate import find_config, find_run, shipped_configs
from ghostmask.launcher.settings import (
    differences,
    field_docs,
    from_dict,
    load_config,
    run_folder,
    setting_types,
    to_dict,
    to_yaml,
)
from ghostmask.masks.config import MaskConfig
from ghostmask.masks.registry import METHODS
from ghostmask.models.config import TostConfig


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
    assert load_config(None, [f"mask.path={override}"]).mask.path == value


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


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("tost.ghost_skip_fraction=0.2", "tost.ghost_skip_fraction = 0.2: is not read with tost.ghost_skip=false"),
        ("tost.activation=mish", "tost.activation = mish: is not read with tost.ghost_swish=false"),
        ("tost.lrsi_steps=5", "tost.lrsi_steps = 5: is not read with tost.lrsi=false"),
        ("tost.ghost_swish=true tost.activation=mish tost.swish_beta_end=9", "tost.swish_beta_end = 9.0: is not read"),
        (
            "tost.ghost_swish=true tost.activation=swish tost.swish_fraction=1",
            "tost.swish_fraction = 1.0: tost.activat",
        ),
        ("tost.activation=silu", "tost.activation = 'silu' is not known"),
        ("mask.method=magnitude mask.path=x train.epochs=0 tost.lrsi=true", "tost.lrsi = true: is not read with train"),
    ],
)
def test_a_tost_setting_that_nothing_would_read_is_refused(overrides: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        check_config(load_config(None, overrides.split()), world_size=1)
    assert str(caught.value).startswith(expected)


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
        ("seed: !!python/object:os.system 1\n", "FILE:1: could not determine a constructor"),
        ("seed: 1\x07\n", "FILE: "),
        ("seed: &a [*a]\n", "FILE:1: found unconstructable recursive node"),
        ("? [a]\n: 1\n", "FILE:1: found unhashable key"),
    ],
)
def test_a_wrong_file_is_answered_with_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    assert error_of(path).startswith(expected.replace("FILE", path))


def test_a_file_that_is_not_text_is_answered_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error_of(str(file))


def test_an_override_into_a_section_that_the_file_made_a_scalar_is_an_error(tmp_path: Path) -> None:
    assert "mask = 5: is a section" in error_of(write(tmp_path, "mask: 5\n"), "mask.density=0.1")


def test_an_empty_file_is_the_defaults_under_the_files_name(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == replace(RunConfig(), run="some")


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


@pytest.mark.parametrize("name", shipped_configs())
def test_a_resolved_config_is_read_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    text = to_yaml(config)
    assert load_config(write(tmp_path, text)) == config
    assert from_dict(to_dict(config)) == config
    assert yaml.safe_load(text) == to_dict(config)


@pytest.mark.parametrize(
    "path", ["", "null", "1e3", "5", "true", "a: b", "#x", "ü\n\t\x7f", "'\"", "~/x y", "-", "1.5"]
)
def test_any_text_and_number_survives_being_written(path: str, tmp_path: Path) -> None:
    config = from_dict(
        {
            "mask": {"path": path, "dense_layers": [path, "fc.*"], "lr": 1e-7},
            "optim": {"weight_decay": 1e22},
            "run": "r",
        }
    )
    text = to_yaml(config)
    assert load_config(write(tmp_path, text)) == config
    assert yaml.safe_load(text) == to_dict(config)


def test_every_setting_has_a_doc_string_which_to_yaml_prints_above_it() -> None:
    text = to_yaml(RunConfig())
    sections: list[Any] = [RunConfig, *(kind for kind in setting_types().values() if is_dataclass(kind))]
    for section in sections:
        docs = field_docs(section)
        for field in fields(section):
            if not is_dataclass(setting_types(section)[field.name]):
                assert f"# {docs[field.name].splitlines()[0]}\n" in text


def test_every_setting_has_a_type_that_can_be_written_in_yaml() -> None:
    for key, kind in setting_types().items():
        scalar = get_args(kind)[0] if get_args(kind) else kind
        assert is_dataclass(kind) or scalar in (int, float, bool, str), key


def test_differences_name_old_and_new_values_but_not_what_may_change() -> None:
    old = load_config("cifar10_resnet32_probmask")
    changed = ["mask.density=0.1", "mask.dense_layers=[fc.weight]", "data.num_workers=7", "train.zero_stage=2", "run=x"]
    new = load_config("cifar10_resnet32_probmask", changed)
    assert differences(old, new) == [
        "mask.density: 0.05 in the run folder, 0.1 given",
        "mask.dense_layers: [] in the run folder, [fc.weight] given",
    ]
    assert differences(old, old) == []


def test_a_shipped_config_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "cifar10_resnet32_probmask"
    expected = shipped_configs()[name]
    assert {find_config(text) for text in (name, f"{name}.yaml", f"configs/{name}.yaml")} == {expected}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / f"{name}.yaml").write_text("seed: 7\n")
    assert load_config(name).seed == 7


def test_an_unknown_config_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    assert "did you mean 'cifar10_resnet32_probmask'?" in error_of("cifar10_resnet32_probmsk")
    assert "there is no such file" in error_of(str(tmp_path / "absent.yaml"))
    write(tmp_path, "seed: 1\n")
    assert "is a folder; give a YAML file" in error_of(str(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert f"is a folder; give the file {tmp_path / 'config.yaml'}" in error_of(str(tmp_path))


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
    ("overrides", "expected"),
    [
        ("mask.method=dense mask.density=0.05", "mask.density = 0.05: is not read with mask.method=dense"),
        ("mask.method=dense finetune.epochs=3", "finetune.epochs = 3: is not read with mask.method=dense"),
        ("mask.method=gmp mask.samples=4", "mask.samples = 4: is not read with mask.method=gmp"),
        ("mask.method=probmask mask.path=x", "mask.path = x: is not read with mask.method=probmask"),
        ("mask.method=probmask mask.update_every=5", "mask.update_every = 5: is not read with mask.method=probmask"),
        ("mask.candidates=5", "mask.candidates = 5: is not read with mask.final=topk"),
        ("mask.method=gmp train.epochs=0", "train.epochs = 0: mask.method=gmp finds its mask while it trains"),
        ("mask.method=magnitude mask.path=x train.epochs=9", "train.epochs = 9: mask.path replaces the dense training"),
        ("mask.method=magnitude mask.path=x optim.lr=0.2", "optim.lr = 0.2: is not read with mask.path=x"),
        ("mask.method=magnitude train.epochs=0 optim.warmup=5st", "optim.warmup = '5st': is longer than train.epochs"),
        ("mask.train_weights=false optim.lr=0.2", "optim.lr = 0.2: is not read with mask.train_weights=false"),
        ("mask.train_weights=false finetune.lr=1", "finetune.lr = 1.0: is not read with mask.train_weights=false"),
        ("optim.warmup=400ep", "optim.warmup = '400ep': is longer than train.epochs = 300"),
        ("optim.milestones=[90]", "optim.milestones = [90]: is not read with optim.schedule=cosine"),
        ("optim.gamma=0.2", "optim.gamma = 0.2: is not read with optim.schedule=cosine"),
        ("optim.schedule=step optim.milestones=[90,300]", "optim.milestones = [90, 300]: train.epochs = 300 ends"),
        ("data.num_train=64", "data.num_train = 64: is not read with data.dataset=cifar10"),
        ("data.jpeg_fraction=1", "data.jpeg_fraction = 1.0: is not read with data.dataset=cifar10"),
    ],
)
def test_a_setting_that_the_run_would_not_read_is_an_error(overrides: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        check_config(load_config(None, overrides.split()), world_size=1)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        "mask.method=dense",
        "mask.method=dense mask.density=1",
        "mask.method=dense finetune.epochs=0 finetune.lr=0.1",
        "mask.train_weights=false",
        "mask.final=best_of mask.candidates=5",
        "mask.method=magnitude mask.path=x train.epochs=0",
        "mask.method=gmp mask.constraint=layerwise mask.start_fraction=0.2",
        "optim.warmup=500st train.epochs=1",
        "data.dataset=synthetic data.num_classes=4",
    ],
)
def test_a_setting_that_the_run_reads_is_not_an_error(overrides: str) -> None:
    check_config(load_config(None, overrides.split()), world_size=1)


@pytest.mark.parametrize(
    ("size", "world_size", "accumulation", "nearest"),
    [(256, 3, 1, "a multiple of 3 (ranks 3 x train.accumulation 1), such as 255 or 258"), (4, 8, 2, "such as 16")],
)
def test_a_batch_that_ranks_cannot_share_names_the_nearest_that_they_can(
    size: int, world_size: int, accumulation: int, nearest: str
) -> None:
    config = load_config(None, [f"data.batch_size={size}", f"train.accumulation={accumulation}"])
    with pytest.raises(InputError, match=r"data\.batch_size") as caught:
        check_config(config, world_size)
    assert str(caught.value).endswith(nearest)


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_what_a_method_reads_agrees_with_its_source(method: str) -> None:
    tree = _source_of(METHODS[method].partition(":")[0])
    shared = {node.name: node for node in _source_of("ghostmask.masks.one_shot").body if isinstance(node, ast.ClassDef)}
    for node in tree.body:  # the loop reaches what is appended
        if isinstance(node, ast.ClassDef):
            tree.body += [shared[name] for name in map(ast.unparse, node.bases) if name in shared]
    names = {field.name for field in fields(MaskConfig)}
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_config(node.value)} & names
    # MaskMethod itself reads dense_layers, which means nothing to a method without masks.
    assert READ_BY_METHOD[method] == read | ({"dense_layers"} if read else set())
    assert resolve(METHODS[method]).protects == ("min_per_layer" in read)
    assert (method in FINETUNED) == any(isinstance(node, ast.Name) and node.id == "FINETUNE" for node in ast.walk(tree))


def _source_of(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _is_config(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "config") or (
        isinstance(node, ast.Attribute) and node.attr == "config"
    )
