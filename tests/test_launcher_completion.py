"""Does a real shell complete what can be typed: commands, options, configs, settings and their values, runs, files?"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ghostmask.launcher.cli import build_parser
from ghostmask.launcher.completion import completion

TYPED = {
    "tra\t": ["train"],
    "train digits_prob\t": ["train", "digits_probmask"],
    "train own\t": ["train", "own.yaml"],
    "train digits_probmask mask.densi\t0.1": ["train", "digits_probmask", "mask.density=0.1"],
    "train digits_probmask mask.method=lt\t": ["train", "digits_probmask", "mask.method=lth"],
    "train digits_probmask --rest\t": ["train", "digits_probmask", "--restart"],
    "train --from fir\t digits_p\t": ["train", "--from", "first", "digits_probmask"],
    "evaluate fir\t data.roo\tx": ["evaluate", "first", "data.root=x"],
    "evaluate fir\t --per-class own\t": ["evaluate", "first", "--per-class", "own.yaml"],
    "show meth\t edge\t": ["show", "methods", "edge_popup"],
    "bench --device cu\t": ["bench", "--device", "cuda"],
    "init pho\t": ["init", "photos"],
    "completion fi\t": ["completion", "fish"],
}
"""Keys that are typed after `ghostmask ` -> the words that the command gets."""

SHELLS = ("bash", "zsh", "fish")
TERMINALS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
PRINTS = "ghostmask() { printf 'got'; printf '<%s>' \"$@\"; echo; }"
"""In place of the command: prints its words."""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        (folder / shell).write_text(completion(shell, build_parser()))
    return folder


class Terminal:
    """A shell that somebody types into."""

    def __init__(self, shell: str, script: Path) -> None:
        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": "dumb", "PS1": "$ ", "INPUTRC": "/dev/null", "HOME": str(script.parent)}
        self.process = subprocess.Popen(TERMINALS[shell], stdin=slave, stdout=slave, stderr=slave, env=env)
        os.close(slave)
        if shell == "zsh":
            self.type("autoload -Uz compinit && compinit -u -D; unsetopt beep zle_bracketed_paste 2>/dev/null\n")
        self.type(f"{PRINTS}\n")
        self.type(f". {script}; echo rea''dy\n")
        self.until(r"ready\r?\n")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str) -> str:
        """What is printed until it matches; the match's first group."""
        read, end = "", time.monotonic() + 60
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.2)[0]:
                read += os.read(self.master, 65536).decode(errors="replace")
            if found := re.search(pattern, read):
                return found.group(0)
        raise AssertionError(f"no {pattern!r} in {read[-2000:]!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The working directory, with a run, a config and a folder."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").touch()
    (tmp_path / "own.yaml").touch()
    (tmp_path / "photos").mkdir()
    return tmp_path


@pytest.mark.parametrize("shell", TERMINALS)
def test_a_tab_completes_what_can_be_typed(shell: str, scripts: Path, place: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    terminal = Terminal(shell, scripts / shell)
    try:
        for keys, words in TYPED.items():
            for part in re.split(r"(\t)", f"ghostmask {keys}"):
                terminal.type(part)
                time.sleep(0.15 if part == "\t" else 0)  # zsh drops what is typed while it looks for words
            terminal.type("\n")
            assert re.findall("<(.*?)/?>", terminal.until(r"got<.*>")) == words, keys
    finally:
        terminal.close()


def test_what_stands_in_the_name_of_a_folder_is_not_run_by_a_tab(scripts: Path, place: Path) -> None:
    for name in ("$(touch taken)", "`touch taken`"):
        (place / name).mkdir()
        (place / "runs" / name).mkdir()
        (place / "runs" / name / "config.yaml").touch()
    terminal = Terminal("bash", scripts / "bash")
    try:
        terminal.type("ghostmask export \t\t\n")
        terminal.until(r"got<.*>")
    finally:
        terminal.close()
    assert not (place / "taken").exists()


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")
def test_fish_completes_what_can_be_typed(scripts: Path, place: Path) -> None:
    for keys, words in TYPED.items():
        line = "ghostmask "
        for part in re.split(r"(\t)", keys):
            if part != "\t":
                line += part.removeprefix(" ") if line.endswith(" ") else part
                continue
            asked = f". {scripts / 'fish'}; complete -C '{line}'"
            done = subprocess.run(["fish", "--no-config", "-c", asked], capture_output=True, text=True, check=True)
            (found,) = {text.partition("\t")[0] for text in done.stdout.splitlines()}
            line = f"{line.rpartition(' ')[0]} {found}{'' if found.endswith('=') else ' '}"
        assert [word.rstrip("/") for word in line.split()[1:]] == words, (keys, done.stderr)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command_and_every_option(shell: str, scripts: Path) -> None:
    text = (scripts / shell).read_text()
    for action in build_parser()._subparsers._group_actions:  # type: ignore[union-attr]
        for name, parser in action.choices.items():  # type: ignore[union-attr]
            assert name in text
            for option in parser._option_string_actions:
                assert option.removeprefix("--") in text or option == "-h", (name, option)
    assert not re.search(r"# (ARGUMENTS|OPTIONS|TAKEN|WORDS|VALUES|LISTS)|NAMES|SHARED", text)
