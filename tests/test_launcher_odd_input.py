"""Does whatever is typed end in a configuration or in one readable line, soon? Odd input by the seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import process_time

import pytest

from ghostmask.engine.errors import InputError
from ghostmask.launcher.checks import check_config, check_steps
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.locate import shipped_configs
from ghostmask.launcher.settings import load_config, run_folder, setting_types, to_yaml
from ghostmask.masks.registry import METHODS

LONGEST_S = 6.0
"""Processor seconds that an answer may take (a text of 100,000 characters takes two)."""

VALUES = [
    "", " ", "0", "-0", "-1", "+1", "1", "2", "7", "0.1", "1.", ".5", "1e-3", "1e3", "1e999", "-1e999", "1e-999",
    "nan", ".nan", ".inf", "-.inf", "inf", "0x10", "0o7", "1_000", "1,5", "10" * 15, "9" * 40, "9" * 5000,
    "1" + "0" * 20, "00", "٣", "½", "true", "false", "True", "yes", "null", "~", "None", "[]", "[1, 2]", "[[1]]",
    "{}", "{a: 1}", "[1", "]", "{", "a: b", "- a", "'", '"', "'1'", '"1"', '"\\0"', '"\\x1b"', '"\\U00110000"',
    "*fc*", "*a", "&a", "&a [*a]", "&a 1", "!!int 1", "!!x", "! a", "!!python/object/apply:os.system [x]", "%", "@",
    "`", "|", ">", "#", "?", ":", ",", "<<", "--restart", "-h", "=", "a=b", "\0", "\t", "\r", "\n", "\x1b[31m",
    "\x7f", "\x85", "\xa0", "\u200b", "\u202e", "\u2028", "\ufeff", "\udcff", "😀", "日本", "ä" * 200, "x" * 300,
    "x" * 120_000, "[" * 3000, "x/" * 2500, ".", "..", "./", "../", "/", "//", "~/x", "~x", "/dev/null",
    "/dev/zero", "/proc/self/mem", "a/../b", "5ep", "500st", "0ep", "-1ep", "1e5ep", "9" * 30 + "st", "0.001ep",
    "cosine", "step", "probmask", "gmp", "lth", "resnet-50", "os:system", "a:b:c", "fc.weight", "[*", "cuda",
    "bf16", "layerwise",
]  # fmt: skip
"""What stands where a value should: other types, signs, sizes, languages, syntax, places."""


LIKELY = [
    "0",
    "1",
    "2",
    "3",
    "10",
    "0.5",
    "0.9",
    "1e-3",
    "true",
    "false",
    "[]",
    "[1, 2]",
    "[fc.weight]",
    "5ep",
    "9st",
    "x",
]
"""Values that are right for many settings: what is wrong is then how settings fit together."""


class Odd:
    """Odd input, a function of the seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(f"odd input {seed}"), folder
        self.keys = list(setting_types())

    def value(self) -> str:
        """One of VALUES, or two of them side by side, or one of them mutilated."""
        chosen = self.random.choice(VALUES)
        kind = self.random.random()
        if kind < 0.1:
            return chosen + self.random.choice(VALUES)
        return self.mutilated(chosen) if kind < 0.2 else chosen

    def mutilated(self, text: str) -> str:
        """The text with a piece of it taken out, doubled, or replaced by something odd."""
        first, last = sorted(self.random.randint(0, len(text)) for _ in range(2))
        last = min(last, first + self.random.choice([1, 3, 30]))
        piece = self.random.choice(["", text[first:last] * 2, self.random.choice(VALUES), "\n", " " * 3])
        return text[:first] + piece + text[last:]

    def override(self) -> str:
        """A key=value of the command line."""
        key = self.random.choice(self.keys)
        kind = self.random.random()
        if kind < 0.1:
            key = self.mutilated(key)
        if kind > 0.9:
            key = "mask.method"
        value = self.random.choice(list(METHODS)) if key == "mask.method" else self.value()
        if 0.1 < kind < 0.7:
            value = self.random.choice(LIKELY)
        return f"{key}={value}" if kind < 0.98 else key

    def text(self) -> str:
        """A shipped configuration with one to four lines or pieces of it changed."""
        lines = self.random.choice(list(shipped_configs().values())).read_text(encoding="utf-8").splitlines()
        for _ in range(self.random.choice([0, 1, 1, 2, 4])):
            at = self.random.randrange(len(lines))
            indent, key = lines[at][: len(lines[at]) - len(lines[at].lstrip())], lines[at].strip().partition(":")[0]
            lines[at] = self.random.choice(
                [f"{indent}{key}: {self.value()}", self.mutilated(lines[at]), f" {lines[at]}", f"\t{lines[at].strip()}",
                 f"{lines[at]}\n{lines[at]}", f"{lines[at]}\n{indent}{self.value()}: {self.value()}", self.value()]
            )  # fmt: skip
        return "\n".join(lines) + "\n"

    def file(self) -> str:
        """The name of a file with such a text, sometimes not in UTF-8, sometimes cut off."""
        content = self.text().encode("utf-8", "surrogateescape")
        kind = self.random.random()
        if kind < 0.05:
            content = content.decode("utf-8", "replace").encode(self.random.choice(["utf-16", "utf-32", "utf-8-sig"]))
        elif kind < 0.1:
            content = content[: self.random.randint(0, len(content))] + self.random.randbytes(3)
        (self.folder / "odd.yaml").write_bytes(content)
        return str(self.folder / "odd.yaml")

    def settings(self) -> None:
        """Read, checked and written down again: a configuration as a run of it would begin."""
        file = self.random.choice([None, self.file, self.file, lambda: self.random.choice(list(shipped_configs()))])
        path = file() if file is not None else None
        overrides = [self.override() for _ in range(self.random.choice([0, 1, 1, 1, 2, 5]))]
        config = load_config(path, overrides)
        written = self.folder / "written.yaml"
        written.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(str(written)) == (config if config.run else load_config(path, [*overrides, "run=written"]))
        check_config(config, self.random.choice([1, 2, 3, 8]))
        check_steps(config, self.random.choice([1, 3, 5000]))
        run_folder(config)

    def command(self) -> None:
        """A command that reads something, with odd arguments; none that trains where they should be right by chance."""
        odd, count = [self.value() for _ in range(3)], self.random.choice(["1", self.value()])
        arguments = self.random.choice(
            [["show", "config", *odd], ["show", odd[0]], ["evaluate", odd[0]], ["evaluate", *odd], ["export", odd[0]],
             ["hessian", odd[0], "--top", count], ["find-mask", odd[0], "--out", odd[1]], ["prepare", odd[0]], odd,
             ["train", odd[0]], ["sweep", odd[0]], ["bench", odd[0], "--json", odd[1]],
             ["tost-table", "digits_tost", "--print", "--seeds", count, "--densities", odd[0], "--masks", odd[1]]]
        )  # fmt: skip
        if run_command(arguments) == 0:
            return
        raise AssertionError(f"no answer to {arguments!r}")


def tried(count: int, folder: Path, act: Callable[[Odd], None]) -> Counter[str]:
    """How `count` tries ended: "read" or "refused"; fails on everything else, naming the seed."""
    ends: Counter[str] = Counter()
    for seed in range(count):
        odd, begin = Odd(seed, folder), process_time()
        try:
            act(odd)
            ends["read"] += 1
        except InputError as error:
            said = str(error)
            assert said, f"seed {seed}: nothing was said"
            assert said.isprintable(), f"seed {seed}: {said!r}"
            assert len(said) < 1000, f"seed {seed}: {said}"
            ends["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert process_time() - begin < LONGEST_S, f"seed {seed}: took {process_time() - begin:.1f} s"
    return ends


@pytest.mark.parametrize("act", [Odd.settings, Odd.command], ids=["settings", "commands"])
def test_whatever_is_typed_ends_in_a_configuration_or_in_one_line(act: Callable[[Odd], None], tmp_path: Path) -> None:
    ends = tried(120, tmp_path, act)
    assert ends["refused"] > 40
    assert ends["read"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("act", [Odd.settings, Odd.command], ids=["settings", "commands"])
def test_thousands_of_odd_inputs_are_answered(act: Callable[[Odd], None], tmp_path: Path) -> None:
    ends = tried(4000 if act is Odd.settings else 2000, tmp_path, act)
    print(f"{act.__name__}: {ends.total()} tries, {ends['read']} read, {ends['refused']} refused, 0 failed")
    assert min(ends.values()) > 10
