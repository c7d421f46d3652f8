"""Is everything refused, in one line, that a run would not read, or that does not fit the number of its ranks?"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import fields

import pytest

from ghostmask.engine.errors import InputError
from ghostmask.engine.registry import resolve
from ghostmask.launcher.checks import check_config, check_steps
from ghostmask.launcher.settings import load_config, setting_types, settings_of
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.registry import METHODS


def said_of(overrides: str, ranks: int = 1) -> str:
    """What the one line says that refuses these settings."""
    with pytest.raises(InputError) as caught:
        check_config(load_config(None, overrides.split()), ranks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("mask.method=dense mask.density=0.05", "mask.density = 0.05: is not read with mask.method=dense"),
        ("mask.method=dense finetune.epochs=3", "finetune.epochs = 3: is not read with mask.method=dense"),
        ("mask.method=gmp mask.samples=4", "mask.samples = 4: is not read with mask.method=gmp"),
        ("mask.method=probmask mask.path=x", "mask.path = x: is not read with mask.method=probmask"),
        (
            "mask.path=x",
            "mask.path = x: is not read with mask.method=probmask; leave it out, or use mask.method=magnitude"
            " or random or snip or grasp or synflow or mlprune or file",
        ),
        ("mask.method=gmp mask.lr=oops", "mask.lr = oops: expected float"),
        ("mask.method=probmask mask.update_every=5", "mask.update_every = 5: is not read with mask.method=probmask"),
        (
            "mask.method=dense mask.dense_layers=[fc.weight]",
            "mask.dense_layers = [fc.weight]: is not read with mask.meth",
        ),
        ("mask.method=dense mask.only=[fc.weight]", "mask.only = [fc.weight]: is not read with mask.method=dense"),
        ("mask.method=snip mask.constraint=layerwise mask.min_per_layer=1", "mask.min_per_layer = 1: is not read with"),
        ("mask.candidates=5", "mask.candidates = 5: is not read with mask.final=topk"),
        ("mask.method=st3 mask.constraint=layerwise", "mask.constraint = layerwise: is not read with mask.method=st3"),
        ("mask.method=feather mask.theta=1.5", "mask.theta = 1.5: "),
        ("mask.method=dnw mask.start_fraction=0.1", "mask.start_fraction = 0.1: is not read with mask.method=dnw"),
        ("mask.method=dnw finetune.epochs=5", "finetune.epochs = 5: is not read with mask.method=dnw"),
        ("mask.method=feather ema.decay=0.9 finetune.epochs=0", "ema.decay = 0.9: averages weights under one mask"),
        ("mask.method=st3 ema.decay=0.9 finetune.epochs=0", "ema.decay = 0.9: averages weights under one mask"),
        ("mask.method=edge_popup tost.lrsi=true", "tost.lrsi = True: the weights stay as mask.init draws them"),
        ("mask.method=edge_popup model.zero_init_last=true", "model.zero_init_last = True: the weights stay as mask"),
        ("mask.method=edge_popup optim.weight_decay=1e-4 optim.decay_norms=false", "optim.decay_norms = false: is not"),
        ("mask.method=gmp train.epochs=0", "train.epochs = 0: mask.method=gmp finds its mask while it trains"),
        ("mask.method=magnitude mask.path=x train.epochs=9", "train.epochs = 9: mask.path replaces the dense training"),
        ("mask.method=magnitude mask.path=x optim.lr=0.2", "optim.lr = 0.2: is not read with mask.path=x"),
        (
            "mask.method=magnitude mask.path=x tost=all",
            "tost.ghost_skip = true: is not read with mask.path=x; leave it",
        ),
        ("mask.method=magnitude train.epochs=0 optim.warmup=5st", "optim.warmup = '5st': is longer than train.epochs"),
        ("mask.train_weights=false optim.lr=0.2", "optim.lr = 0.2: is not read with mask.train_weights=false"),
        ("mask.train_weights=false finetune.lr=1", "finetune.lr = 1.0: is not read with mask.train_weights=false"),
        ("optim.warmup=400ep", "optim.warmup = '400ep': is longer than train.epochs = 300"),
        ("optim.milestones=[90]", "optim.milestones = [90]: is not read with optim.schedule=cosine"),
        ("optim.gamma=0.2", "optim.gamma = 0.2: is not read with optim.schedule=cosine"),
        ("optim.schedule=step optim.milestones=[90,300]", "optim.milestones = [90, 300]: train.epochs = 300 ends"),
        ("optim.decay_norms=false optim.weight_decay=0", "optim.decay_norms = false: is not read with optim.weight_d"),
        (
            "optim.lars_trust=0.01",
            "optim.lars_trust = 0.01: is not read with optim.lars=false; leave it out, or use opt",
        ),
        ("optim.scale_lr=square", "optim.scale_lr = 'square' is not known"),
        ("mask.train_weights=false optim.lars=true", "optim.lars = true: is not read with mask.train_weights=false"),
        (
            "augment.mix_fraction=0.5",
            "augment.mix_fraction = 0.5: is not read with augment.mixup=0 and augment.cutmix=0",
        ),
        (
            "augment.magnitude=5",
            "augment.magnitude = 5: is not read with augment.randaugment=0; leave it out, or use aug",
        ),
        ("distill.alpha=0.7", "distill.alpha = 0.7: is not read with distill.path="),
        ("distill.model=resnet20", "distill.model = 'resnet20': is read with distill.path only"),
        ("ema.decay=0.9 finetune.epochs=0", "ema.decay = 0.9: averages weights under one mask, and a search"),
        ("ema.decay=0.9 mask.train_weights=false", "ema.decay = 0.9: averages weights under one mask, and a search"),
        (
            "mask.method=snip model.zero_init_last=true",
            "model.zero_init_last = True: mask.method=snip looks at the init",
        ),
        ("mask.method=synflow model.zero_init_last=true", "model.zero_init_last = True: mask.method=synflow looks at"),
        ("tost.lrsi=true model.zero_init_last=true", "model.zero_init_last = True: tost.lrsi looks at the init"),
        (
            "mask.method=snip mask.path=x model.zero_init_last=true",
            "model.zero_init_last = true: is not read with mask.path=x; leave it out, or use a run from the init",
        ),
        ("data.num_train=64", "data.num_train = 64: is not read with data.dataset=cifar10"),
        ("data.jpeg_fraction=1", "data.jpeg_fraction = 1.0: is not read with data.dataset=cifar10"),
    ],
)
def test_a_setting_that_the_run_would_not_read_is_an_error(overrides: str, expected: str) -> None:
    assert said_of(overrides).startswith(expected)


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
        ("mask.method=magnitude train.epochs=0 tost.lrsi=true", "tost.lrsi = true: is not read with train.epochs=0"),
        (
            "mask.method=magnitude mask.path=x finetune.epochs=0 tost.label_smoothing=0.1",
            "tost.label_smoothing = 0.1: is not read with mask.path=x",
        ),
        ("mask.method=snip train.epochs=0 tost.label_smoothing=0.1", "tost.label_smoothing = 0.1: is not read with no"),
    ],
)
def test_a_tost_setting_that_nothing_would_read_is_refused(overrides: str, expected: str) -> None:
    assert said_of(overrides).startswith(expected)


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
        "mask.method=magnitude mask.path=x train.epochs=0 tost.label_smoothing=0.1",
        "mask.method=edge_popup finetune.epochs=0 tost.ghost_skip=true tost.ghost_swish=true tost.label_smoothing=0.1",
        "mask.method=st3 mask.sigma=true ema.decay=0.9 tost=all",
        "mask.method=file mask.path=x mask.density=1.0 mask.dense_layers=[fc.weight]",
        "mask.train_weights=false tost.ghost_skip=true optim.lr=0.2 finetune.epochs=0",
        "mask.noises=4",
        "ema.decay=0.9 augment.mixup=0.2 distill.path=x distill.alpha=1 optim.lars=true optim.lars_trust=0.01 tost=all",
        "mask.method=file mask.path=x model.zero_init_last=true",
        "mask.method=lth ema.decay=0.9 finetune.epochs=0",
        "optim.warmup=500st train.epochs=2",
        "data.dataset=synthetic data.num_classes=4",
    ],
)
def test_a_setting_that_the_run_reads_is_not_an_error(overrides: str) -> None:
    check_config(load_config(None, overrides.split()), world_size=1)


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ("data.batch_size=256", 3, "data.batch_size = 256: give a multiple of 3 (ranks 3), such as 255 or 258"),
        ("data.batch_size=4", 8, "data.batch_size = 4: give a multiple of 8 (ranks 8), such as 8"),
        ("mask.noises=4 data.batch_size=10", 2, "data.batch_size = 10: give a multiple of 4 (ranks 2, mask.noises 4), "
                                                "such as 8 or 12"),
        ("train.replicas=8 data.batch_size=100", 2, "data.batch_size = 100: give a multiple of 8 (train.replicas 8), "
                                                    "such as 96 or 104"),
        ("train.replicas=8", 3, "ranks = 3: do not fit train.replicas = 8; start 1, 2, 4, 8 ranks"),
        ("train.replicas=8", 16, "ranks = 16: do not fit train.replicas = 8; start 1, 2, 4, 8 ranks"),
        ("train.replicas=12 mask.noises=4", 3, "ranks = 3: do not fit train.replicas = 12 and mask.noises = 4; start "
                                               "1, 2, 4, 12 ranks"),
        ("train.replicas=6 mask.noises=4", 1, "train.replicas = 6: give a multiple of mask.noises = 4"),
        ("mask.noises=4", 6, "mask.noises = 4: give a divisor or a multiple of the number of ranks, 6"),
    ],
)  # fmt: skip
def test_ranks_that_cannot_share_the_batch_are_refused_with_the_numbers_that_can(
    settings: str, ranks: int, expected: str
) -> None:
    assert said_of(settings, ranks) == expected


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_numbers_of_ranks_that_divide_the_parts_of_a_batch_are_not_refused(ranks: int) -> None:
    check_config(load_config(None, ["train.replicas=8", "mask.noises=4"]), ranks)
    check_config(load_config(None, ["mask.noises=4"]), ranks)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("train.epochs=1", "train.epochs = 1: the density has no time to fall to 0.1 from mask.start_fraction = 0.16 "
                           "to mask.end_fraction = 0.6; give at least 2"),
        ("train.epochs=4 mask.start_fraction=0.5 mask.end_fraction=0.6", "train.epochs = 4: the density has no time to "
         "fall to 0.1 from mask.start_fraction = 0.5 to mask.end_fraction = 0.6; give at least 5"),
        ("mask.end_fraction=1", "train.epochs = 300: the density has no time to fall to 0.1 from mask.start_fraction "
                                "= 0.16 to mask.end_fraction = 1; give fractions that lie further apart, and an end"),
        ("mask.start_fraction=0.6", "mask.start_fraction = 0.6: give less than mask.end_fraction = 0.6"),
    ],
)  # fmt: skip
def test_a_search_in_which_the_density_cannot_fall_is_refused_with_the_length_that_works(
    settings: str, expected: str
) -> None:
    assert said_of(settings).startswith(expected)
    enough = re.search(r"at least (\d+)$", expected)
    if enough:
        others = settings.split()[1:]
        check_config(load_config(None, [f"train.epochs={enough[1]}", *others]), world_size=1)
        assert "has no time to fall" in said_of(" ".join([f"train.epochs={int(enough[1]) - 1}", *others]))


def test_a_search_that_prunes_nothing_may_be_as_short_as_it_likes() -> None:
    check_config(load_config(None, ["train.epochs=1", "mask.density=1"]), world_size=1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("mask.method=gmp train.epochs=1 mask.start_fraction=0 mask.end_fraction=0.1", "train.epochs = 1: the density "
         "has no time to fall to 0.1 from mask.start_fraction = 0 to mask.end_fraction = 0.1; give at least 2"),
        ("train.epochs=2 optim.warmup=9st", "optim.warmup = '9st': is 9 steps, the main phase has 6; give at most 6st, "
                                            "or train.epochs=3"),
        ("train.epochs=2 optim.warmup=0.1ep", "optim.warmup = '0.1ep': rounds to no step (an epoch has 3); give 1st, "
                                              "or 0ep"),
        ("train.epochs=2 tost.ghost_swish=true tost.activation=mish tost.swish_fraction=0.9",
         "tost.swish_fraction = 0.9: leaves none of 6 steps to train ReLUs in; give less"),
        ("mask.method=lth train.epochs=1 mask.rewind=4st", "mask.rewind = '4st': is 4 steps, a round has 3"),
    ],
)  # fmt: skip
def test_a_schedule_that_rounds_to_nothing_with_three_steps_per_epoch_is_refused(settings: str, expected: str) -> None:
    config = load_config(None, settings.split())
    check_config(config, world_size=1)
    with pytest.raises(InputError) as caught:
        check_steps(config, steps_per_epoch=3)
    assert str(caught.value).startswith(expected)


def test_a_gmp_window_of_one_update_is_long_enough() -> None:
    short = ["mask.method=gmp", "mask.start_fraction=0", "mask.end_fraction=0.1"]
    for epochs, steps in ((2, 3), (1, 6), (1, 100)):
        check_steps(load_config(None, [*short, f"train.epochs={epochs}"]), steps)


def test_every_number_of_a_configuration_has_an_upper_bound() -> None:
    numbers = {name: kind for name, kind in setting_types().items() if kind in (int, float)}
    assert len(numbers) > 50
    for name, kind in numbers.items():
        method = "mlprune" if name.startswith("mask.") else "probmask"
        readers = [m for m in METHODS if name.removeprefix("mask.") in {f.name for f in fields(settings_of(m))}]
        chosen = [f"mask.method={(readers or [method])[0]}"]
        floats, ints = ("-1e300", "1e300", "1e999", ".nan", "-.inf"), ("1" + "0" * 25, "-" + "9" * 25)
        for value in floats if kind is float else ints:
            with pytest.raises(InputError, match=rf"^{re.escape(name)} = "):
                load_config(None, [*chosen, f"{name}={value}"])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_every_setting_that_it_lists(method: str) -> None:
    """Outside of the settings' own checks: as an attribute, or by getattr, somewhere in the files of the method's
    classes and in masks.granularity, or by `Scheduled.window`."""
    bases = [base for base in resolve(METHODS[method]).__mro__ if issubclass(base, MaskMethod)]
    read: set[str] = {"noises"}  # by launcher.config, for every method
    for module in {base.__module__ for base in bases} | {"ghostmask.masks.granularity"}:
        tree = ast.parse(inspect.getsource(importlib.import_module(module)))
        tree.body = [node for node in tree.body if not (isinstance(node, ast.ClassDef) and node.name == "Settings")]
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr"]
        read |= {str(n.args[1].value) for n in calls if isinstance(n.args[1], ast.Constant)}
    read |= {"start_fraction", "end_fraction"} if "window" in read else set()
    assert {field.name for field in fields(settings_of(method))} - {"method"} <= read
