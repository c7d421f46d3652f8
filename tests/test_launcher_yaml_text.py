"""Is every odd YAML text, in a file or on the command line, answered in one line and at once?"""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter

import pytest

from ghostmask.engine.errors import LONGEST, InputError
from ghostmask.launcher.settings import load_config
from ghostmask.launcher.yaml_text import MOST_VALUES, read_yaml, read_yaml_file

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""366 bytes that stand for 387 million values."""


def refusal(text: str) -> str:
    """What is said of a text, in well under the time that would make somebody press Ctrl-C."""
    begin = perf_counter()
    with pytest.raises(InputError) as caught:
        read_yaml(text, "FILE")
    assert perf_counter() - begin < 10
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= LONGEST + 10
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: !!int abc\n", "FILE:1: tags such as !!int are not read here"),
        ("seed: !!python/object/apply:os.system [true]\n", "FILE:1: tags such as !!python/object/apply:os.system are"),
        ("a: ! b\n", "FILE:1: tags such as ! are not read here"),
        ("!!omap\na: 1\n", "FILE:1: tags such as !!omap"),
        (BOMB, f"FILE:5: holds more than {MOST_VALUES} values (an alias, *, counts as what it stands for)"),
        ("a: &a [&b [*b]]\n", "FILE:1: the alias *b stands inside of what it names"),
        ("seed: &a {b: *a}\n", "FILE:1: the alias *a stands inside of what it names"),
        ("[" * 50_000, "FILE: is nested more than 20 levels deep"),
        ("{" * 50_000, "FILE: is nested more than 20 levels deep"),
        ("? " * 5_000, "FILE: is nested more than 20 levels deep"),
        ("- " * 20_000 + "\n", "FILE:1: is nested more than 20 levels deep"),
        ("".join(" " * i + "a:\n" for i in range(400)), "FILE:20: is nested more than 20 levels deep"),
        ("a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(20)), "FILE:20: holds more than 20 "
                                                                                        "levels"),
        ("x" * 100_001, "FILE: is longer than 100000 characters"),
        ("a: [" + "x," * 10_000 + "]", "FILE: holds more than 10000 values"),
        ("dense_layers: [*fc*]", "FILE: expected alphabetic or numeric character, but found '*'; text that begins with "
                                 '* needs quotes, such as "*..."'),
        ("a:\n  - *fc\n", "FILE:2: found undefined alias 'fc'; text that begins with * needs quotes"),
        ("a: @x\n", "FILE:1: found character '@' that cannot start any token; text that begins with @ needs quotes"),
        ("a: %x\n", "FILE:1: found character '%' that cannot start any token; text that begins with % needs quotes"),
        ("mask:\n\tdensity: 1\n", "FILE:2: found character '\\t' that cannot start any token; indent with spaces"),
        ("a: 1\nb: \0\n", "FILE:2: holds an invisible character (U+0000); save it as plain text, in UTF-8"),
        ("a: 1 # \x1b[31m\n", "FILE:1: holds an invisible character (U+001B)"),
        ("a: 1 # \u2028b: 2\n", "FILE:1: holds line separator (U+2028)"),
        ("a: 1\n\xa0b: 0.2\n", "FILE:2: \\xa0b holds no-break space (U+00A0); put the text in quotes"),
        ("mask:\n  density:\xa00.2\n", "FILE:2: density:\\xa00.2 holds no-break space (U+00A0)"),
        ("a\u200b: 1\n", "FILE:1: a\\u200b holds zero width space (U+200B)"),
        ('a: "\\U00110000"\n', "FILE: is not YAML: "),
        ("a: 1\n---\nb: 2\n", "FILE:2: but found another document"),
        ("a: 'b\n", "FILE:2: found unexpected end of stream"),
        ("a: 1\nb: 2\na: 3\n", "FILE:3: a is given twice, first in line 1"),
    ],
    ids=range(30),
)  # fmt: skip
def test_an_odd_text_is_answered_with_its_line_and_the_way_out(text: str, expected: str) -> None:
    assert refusal(text).startswith(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\ufeffa: 1\n", {"a": "1"}),
        ('a: "b\xa0c"\n', {"a": "b\xa0c"}),
        ('a: "*fc*"\n', {"a": "*fc*"}),
        ("# \xa0 ok\r\na: &x [1, 2]\r\nb: *x\r\n", {"a": ["1", "2"], "b": ["1", "2"]}),
        ("", {}),
    ],
)
def test_what_is_only_unusual_is_read(text: str, value: object) -> None:
    assert read_yaml(text, "FILE") == value


def test_the_same_holds_on_the_command_line() -> None:
    for override, expected in {
        "mask.dense_layers=[*fc*]": "needs quotes",
        "optim.milestones=!!seq []": "tags such as !!seq",
        "optim.milestones=" + "[" * 5000: "nested more than 20 levels",
        "mask.density=\xa00.1": "no-break space",
        "seed=&a [*a]": "the alias *a stands inside",
        "run=\udcff": "is not UTF-8",
        "data.root=a\0b": "holds a NUL",
        'data.root="\\0"': "holds a NUL",
        f"optim.lr={'9' * 90_000}": "optim.lr = inf: give a number in (0, 1e+09]",
        f"seed={'9' * 90_000}": "expected int",
    }.items():
        with pytest.raises(InputError) as caught:
            load_config(None, [override])
        assert expected in str(caught.value)
        assert len(str(caught.value)) <= LONGEST + 10


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: caf\xe9\n", "FILE:1: cannot be read: byte 0xe9 is not UTF-8; save it as UTF-8"),
        ("a: 1\n".encode("utf-16"), "FILE: is UTF-16; save it as UTF-8"),
        ("a: 1\n".encode("utf-32"), "FILE: is UTF-32; save it as UTF-8"),
        ("a: 1\n".encode("utf-16-le"), "FILE:1: holds an invisible character (U+0000); save it as plain text"),
        (b"a: 1 #" + b"x" * 500_000, "FILE: cannot be read: has 500,006 bytes, more than 400,000"),
    ],
)  # fmt: skip
def test_a_file_in_another_encoding_or_without_end_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "some.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_yaml_file(file)
    assert str(caught.value).startswith(expected.replace("FILE", str(file)))


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe", "zero", "loop", "folder"):
        with pytest.raises(InputError, match=r"pipe or device|no such file|is a folder"):
            load_config(str(tmp_path / f"{name}.yaml"))
        with pytest.raises(InputError, match=r"cannot be read: (is a|Is a|Too many)"):
            read_yaml_file(tmp_path / f"{name}.yaml")
