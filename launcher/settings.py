"""How does a RunConfig come from YAML and key=value, and how is it written down again?"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ghostmask.engine.errors import InputError, bad_value
from ghostmask.launcher import locate
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.methods import method_of
from ghostmask.launcher.values import as_text, convert
from ghostmask.launcher.yaml_text import Plain, read_yaml, read_yaml_file
from ghostmask.masks.registry import METHODS
from ghostmask.masks.settings import MaskSettings
from ghostmask.models.config import TOST_PRESETS, TostConfig

Section = TypeVar("Section")

PRESETS: dict[type, dict[str, dict[str, Any]]] = {TostConfig: TOST_PRESETS}
"""Sections that can be given one word (tost=all, in YAML tost: all) -> word -> the settings that it adds to the
section; a word without settings empties it."""

GONE = {
    "train.accumulation": "train.replicas, the parts that data.batch_size is cut into",
    "mask.noise": "mask.noises",
    "mask.gradient_bf16": "train.precision=bf16",
}
"""Settings of earlier versions -> what does their work now."""


def load_config(path: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The dataclass defaults, then the YAML file (or shipped config) of `path`, then each `key=value` of overrides.

    `run` is the file's stem unless it is set. Raises InputError, one line, for whatever is not a valid setting.
    """
    file = locate.find_config(path) if path else None
    values: Any = read_yaml_file(file) if file else {}
    if not isinstance(values, dict):
        raise InputError(f"{file}: give settings as `key: value` lines")
    for name, kind in setting_types().items():
        if name in values and kind in PRESETS:
            values[name] = _without_preset(kind, values[name])
    given: set[str] = set()
    # A preset first: what is said about one of its settings goes on top, wherever it stands.
    for item in sorted(overrides, key=lambda item: item.partition("=")[0] not in _sections_with_presets()):
        _override(values, item, given)
    config = from_dict(values)
    return replace(config, run=file.stem) if file and not config.run else config


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The RunConfig of a nested dict; missing settings keep their defaults. Raises InputError as load_config."""
    return _build(RunConfig, {"mask": {}, **values}, "")


def to_dict(config: Any) -> dict[str, Any]:
    """A nested dict of plain values (lists for tuples) that from_dict turns back into an equal configuration."""
    values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        values[field.name] = (
            to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        )
    return values


def to_yaml(config: RunConfig) -> str:
    """A YAML text that load_config turns back into `config`, with every setting's doc string as a comment above it."""
    lines = _yaml_lines(config, "")
    return "\n".join(lines) + "\n"


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line per setting that differs between a run folder and what is given now, without those that may change.

    Of another mask method only what both read: the method differs.
    """
    before, given = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{name}: {as_text(value)} in the run folder, {as_text(given[name][0])} given"
        for name, (value, may_change) in before.items()
        if name in given and value != given[name][0] and not may_change
    ]


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return {name: value for name, (value, _) in _leaves(config)}


def run_folder(config: RunConfig) -> Path:
    """The folder of the run: runs/NAME, or `run` itself where it has a slash. Raises InputError where that is no place
    for a run's files (launcher.locate)."""
    return locate.new_run_folder(config.run)


def field_docs(cls: type) -> dict[str, str]:
    """field name -> the string that stands under it in the source of the dataclass `cls`."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):  # a class's own string goes before what it inherits
        docs |= _own_docs(base) if is_dataclass(base) else {}
    return docs


def _own_docs(cls: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            docs[field.target.id] = inspect.cleandoc(below.value.value)
    return docs


def setting_types(cls: type = RunConfig) -> dict[str, Any]:
    """dotted key -> type, of every setting and every section in and below `cls`; of mask, what any method reads."""
    return _types(cls, "", tuple(METHODS.items()))


@cache
def _types(cls: type, prefix: str, methods: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    types = {}
    for field in fields(cls):
        kind = types[prefix + field.name] = hints[field.name]
        sections: list[Any] = [settings_of(name) for name, _ in methods] if kind is MaskSettings else [kind]
        for section in sections if is_dataclass(kind) else ():
            types |= _types(section, f"{prefix}{field.name}.", methods)
    return types


def settings_of(method: str) -> type[MaskSettings]:
    """The settings that a mask method reads. Raises InputError for an unknown name. Imports the method's file."""
    return method_of(method).Settings


def _override(values: dict[str, Any], item: str, given: set[str]) -> None:
    """Set one key=value in the nested dict. Text settings take the value as it stands, the others as YAML."""
    key, equals, text = item.partition("=")
    if not equals:
        raise InputError(f"{item}: give settings as key=value, such as mask.density=0.05")
    kind = setting_types().get(key)
    if kind is None:
        raise _unknown_key(key)
    preset = PRESETS.get(kind, {}).get(text)
    if is_dataclass(kind) and preset is None:
        raise _is_section(key, Plain(text))
    if key in given:
        raise InputError(f"{item}: {key} is given twice")
    given.add(key)
    if preset is not None:
        section = values.setdefault(key, {})
        if not isinstance(section, dict):
            raise _is_section(key, section)
        if not preset:
            section.clear()
        section.update(preset)
        return
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    as_yaml = quoted or (kind is not str and text)
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise _is_section(section, values)
    values[name] = read_yaml(text, item) if as_yaml else Plain(text) if text or kind is not str else ""


def _without_preset(cls: type, value: Any) -> Any:
    """The settings that a preset's name stands for; any other value as it is."""
    words = PRESETS.get(cls, {})
    return dict(words[value]) if isinstance(value, str) and value in words else value


def _sections_with_presets() -> list[str]:
    return [name for name, kind in setting_types().items() if kind in PRESETS]


def _build(cls: type[Section], values: Any, prefix: str) -> Section:
    values = _without_preset(cls, values)
    if not isinstance(values, Mapping):
        raise _is_section(prefix.rstrip("."), values)
    if cls is MaskSettings:
        return _build_mask(values, prefix)  # type: ignore[return-value]
    return _build_class(cls, values, prefix)


def _build_class(cls: type[Section], values: Mapping[str, Any], prefix: str) -> Section:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise _unknown_key(name)
        section = is_dataclass(hints[key])
        arguments[str(key)] = _build(hints[key], value, f"{name}.") if section else convert(name, value, hints[key])
    for field in fields(cls):  # type: ignore[arg-type]
        if field.metadata.get("path") and arguments.get(field.name):
            arguments[field.name] = locate.typed_path(f"{prefix}{field.name}", arguments[field.name])
    return cls(**arguments)


def _build_mask(values: Mapping[str, Any], prefix: str) -> MaskSettings:
    """The settings of the method that is named; one that it does not read is refused with the methods that do."""
    method = str(values.get("method", MaskSettings.method))
    cls = settings_of(method)
    known = {field.name for field in fields(cls)}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key in known or name not in setting_types():
            continue
        if key == "density" and convert(name, value, float) == 1:  # what takes back the density of a configuration file
            continue
        if key == "density" and cls.decided_by:
            result = f"is a result with mask.method={method}, decided by {cls.decided_by}"
            fix = (
                "leave it out (mask.density=1 takes back a file's) and give that, or let `ghostmask find-density` look"
            )
            raise bad_value(name, convert(name, value, float), f"{result}; {fix}")
        readers = [other for other in METHODS if key in {field.name for field in fields(settings_of(other))}]
        other = f"mask.method={' or '.join(readers)}"
        raise InputError(
            f"{name} = {as_text(convert(name, value, setting_types()[name]))}: is not read with mask.method={method}; "
            f"leave it out, or use {'mask.density=1' if key == 'density' else other}"
        )
    return _build_class(cls, {key: v for key, v in values.items() if key in known or key != "density"}, prefix)


def _is_section(name: str, value: Any) -> InputError:
    known = [key for key in setting_types() if key.startswith(f"{name}.")]
    words = list(PRESETS.get(setting_types()[name], {}))
    fix = f"is a section; give its settings, such as {known[0]}"
    return bad_value(name, value, f"{fix}, or {' or '.join(words)}" if words else fix)


def _unknown_key(name: str) -> InputError:
    """Names the settings with the same last word, else the one spelled most alike, else the sections."""
    types = setting_types()
    keys = [key for key, kind in types.items() if not is_dataclass(kind)]
    last = name.rpartition(".")[2]
    if name in GONE:
        return InputError(f"{name} is not a setting any more: give {GONE[name]}; see ghostmask show config")
    if name in types:
        return InputError(f"{name} is not a key of a YAML file: write {last}: below {name.rpartition('.')[0]}:")
    near = [key for key in keys if key.rpartition(".")[2] == last] or difflib.get_close_matches(name, keys, n=1)
    if not near:
        words = {key.rpartition(".")[2]: key for key in keys}
        near = [words[word] for word in difflib.get_close_matches(last, words, n=1)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(k for k in types if '.' not in k)};"
    return InputError(f"{name} is not a setting: {hint} see ghostmask show config")


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, bool]]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, (value, bool(field.metadata.get("may_change")))


def _yaml_lines(config: Any, indent: str) -> list[str]:
    docs, hints = field_docs(type(config)), get_type_hints(type(config))
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        section = is_dataclass(value)
        doc = inspect.getdoc(hints[field.name]) if section else docs.get(field.name)
        if section:
            lines.append("")
        lines += [f"{indent}# {line}".rstrip() for line in (doc or "").splitlines()]
        lines.append(f"{indent}{field.name}:" if section else f"{indent}{field.name}: {as_text(value)}")
        if section:
            lines += _yaml_lines(value, indent + "  ")
    return lines
