"""Is what the documents say still true: paths, commands, settings, exit codes?"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

import ghostmask.engine.errors
import ghostmask.launcher.main
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.cli import build_parser
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.locate import shipped_configs
from ghostmask.launcher.settings import load_config, setting_types

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
SECTIONS = "model|data|mask|tost|optim|train|finetune|augment|ema|distill|checkpoint"


def prose_and_code(text: str) -> tuple[str, list[str]]:
    """(text without fenced blocks, lines of the fenced blocks; a line that ends in a backslash goes on in the next)."""
    blocks = re.findall(r"^( *)```\w*\n(.*?)^\1```", text, flags=re.M | re.S)
    lines = [line.strip() for _, block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S), lines


def quoted(text: str) -> list[str]:
    """Everything that stands between backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose_and_code(text)[0])


def command_lines() -> list[tuple[str, str]]:
    """(document, command) of every shell line in a document's fenced blocks."""
    found = []
    for path in DOCUMENTS:
        for line in prose_and_code(path.read_text())[1]:
            command = re.sub(r"\s+#.*", "", line).removeprefix("$ ")
            if re.match(r"(make|ghostmask|torchrun|srun|python)\b", command):
                found.append((path.name, command))
    return found


def ghostmask_arguments() -> list[tuple[str, str]]:
    """(document, arguments) of every call of our command line in the documents."""
    calls = []
    for document, command in command_lines():
        match = re.search(r"(?:^ghostmask|-m ghostmask)\s+(.*)", command)
        if match:
            calls.append((document, match.group(1)))
    return calls


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_and_code(path.read_text())[0]):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_file_of_the_project_that_is_named_exists(path: Path) -> None:
    inside = re.compile(r"(engine|launcher|masks|models|data_pipelines|configs|tests|docs|benchmarks|\.ci)/[\w./-]*")
    for text in quoted(path.read_text()):
        if inside.fullmatch(text):
            assert (ROOT / text).exists(), f"{path.name} names {text}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_make_target_that_is_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    prose, code = prose_and_code(path.read_text())
    for text in [*re.findall(r"`([^`\n]+)`", prose), *code]:
        for target in re.findall(r"^make ([a-z-]+)", text):
            assert target in targets, f"{path.name}: make {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_setting_that_is_named_exists(path: Path) -> None:
    known = setting_types()
    for text in quoted(path.read_text()):
        match = re.fullmatch(rf"((?:{SECTIONS})\.[a-z_]+)(?:=\S*)?", text)
        if match and not match.group(1).endswith((".py", ".yaml", ".json", ".md")):
            assert match.group(1) in known, f"{path.name} names {text}"


@pytest.mark.parametrize(("document", "arguments"), ghostmask_arguments())
def test_every_command_in_the_documents_is_one(document: str, arguments: str) -> None:
    """Parsed by the command line itself, its settings checked; nothing is run."""
    parsed, rest = build_parser().parse_known_args(shlex.split(arguments))
    overrides = [*getattr(parsed, "overrides", []), *rest]
    assert not [item for item in rest if item.startswith("-")], f"{document}: unknown options {rest}"
    configs = [parsed.config] if hasattr(parsed, "config") else []
    if hasattr(parsed, "vary"):  # of `ghostmask sweep`, whose configurations stand among the settings
        configs = [text for text in overrides if "=" not in text]
        settings = [text for text in overrides if "=" in text]
        overrides = [*settings, *(text.split(",")[0] for text in parsed.vary)]
    for config in configs:
        check_config(load_config(config, overrides), world_size=1)


def test_the_readme_shows_both_commands_and_every_subcommand() -> None:
    commands = [command for document, command in command_lines() if document == "README.md"]
    assert {"make smoke", "make test"} <= set(commands)
    for name in ("train", "find-mask", "evaluate", "export", "prepare", "show"):
        assert any(command.startswith(f"ghostmask {name} ") for command in commands), name


def test_the_exit_codes_in_the_operations_document_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| `?(\w*)`? *\|", (ROOT / "docs/operations.md").read_text(), flags=re.M)
    documented = {name: int(code) for code, name in rows if name}
    constants = {**vars(ghostmask.engine.errors), **vars(ghostmask.launcher.main)}
    in_code = {name: value for name, value in constants.items() if name.startswith("EXIT_")}
    assert documented == in_code
    assert {int(code) for code, name in rows if not name} == {0}


def test_the_operations_document_lists_exactly_the_settings_that_may_change() -> None:
    paragraph = (ROOT / "docs/operations.md").read_text().partition("`may_change`):\n\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w.]+)`", paragraph)) == set(changeable(RunConfig))


def changeable(section: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of the settings that are declared with may_change."""
    types = get_type_hints(section)
    for field in fields(section):
        if is_dataclass(types[field.name]):
            yield from changeable(types[field.name], f"{prefix}{field.name}.")
        elif field.metadata.get("may_change"):
            yield prefix + field.name


def test_make_smoke_starts_over_a_run_that_nobody_else_has() -> None:
    script = (ROOT / ".ci" / "smoke.sh").read_text()
    run = re.search(r"^run=runs/(\S+)", script, re.MULTILINE)
    assert run is not None
    assert run[1] not in shipped_configs()
    for line in script.splitlines():
        if "--restart" in line:
            assert '"run=$run"' in line


def test_the_settings_of_the_cifar_smoke_test_fit_its_configs() -> None:
    script = (ROOT / ".ci/smoke_cifar.sh").read_text()
    assert re.findall(r"config=(\w+)", script) == ["cifar10_resnet9_probmask", "cifar10_resnet32_gmp"]
    gpu, cpu = re.findall(rf"settings\+=\(((?:{SECTIONS})\.[^)]*)\)", script)[1:]  # the first names the dataset
    for config, settings in (("cifar10_resnet9_probmask", gpu), ("cifar10_resnet32_gmp", cpu)):
        for dataset in ("cifar10", "cifar100"):
            check_config(load_config(config, [*settings.split(), f"data.dataset={dataset}"]), world_size=1)
        assert load_config(config).mask.density == 0.05  # type: ignore[attr-defined]
