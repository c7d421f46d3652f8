"""Whatever happens to one file of a run folder: the run goes on to the same bits, or says in one line why it does not.

A generator breaks one thing at a time, by seed. A few seeds run with the tests, the campaign with `-m soak`.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch.distributed as dist
from image_runs import Runs

from ghostmask.engine import lease
from ghostmask.engine.errors import EXIT_NOT_SAVED
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World
from ghostmask.launcher.main import main

pytestmark = pytest.mark.timeout(120)

PATIENCE = 24
"""Seeds in the ordinary tests; the campaign has CAMPAIGN."""
CAMPAIGN = 500
MOST_BYTES = 12 << 30
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ghostmask.engine.lease.SILENCE_S", 0.5)  # of a lease that cannot be read


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, str]:
    """Runs with 3 checkpoints of which the last was lost, another run beside them, and the digest of the end."""
    runs = Runs(tmp_path_factory.mktemp("half"))
    runs.pictures(0, 8)
    runs.prepare()
    assert runs.call("train") == 0
    assert runs.call("train", "other", "seed=4") == 0
    end = digest(runs.folder / "run")
    assert end != digest(runs.folder / "other")
    shutil.rmtree(runs.folder / "run" / "checkpoints" / "step-00000006")
    return runs, end


def digest(run: Path) -> str:
    return hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size + 1))


def grow(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 200)))


def scramble(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice((0, 1, 30, 5000))))


def lose(path: Path, draw: random.Random) -> None:
    path.unlink()


def replace(path: Path, draw: random.Random) -> None:
    path.unlink()
    kind = draw.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    else:
        path.symlink_to(("nowhere", "/dev/zero")[kind - 2])


def from_another(path: Path, draw: random.Random) -> None:
    """A file of the same name from another checkpoint, or from the other run."""
    candidates = [p for p in path.parents[3].rglob(path.name) if p != path and p.is_file()]
    if candidates:
        shutil.copyfile(draw.choice(sorted(candidates)), path)


def move_checkpoint(path: Path, draw: random.Random) -> None:
    folder = path.parent if path.parent.name.startswith("step-") else next(iter(sorted(path.parents[0].glob("step-*"))))
    folder.rename(folder.with_name(f"step-{draw.choice((0, 1, 3, 5, 6, 7, 99999999)):08d}"))


def copy_checkpoint(path: Path, draw: random.Random) -> None:
    """Over another name, of this run or of the other one."""
    run = path.parents[2] if path.parent.name.startswith("step-") else path.parents[0]
    source = draw.choice(sorted(run.parent.glob("*/checkpoints/step-*")))
    target = run / "checkpoints" / draw.choice(("step-00000002", "step-00000004", "step-00000006", "step-00000004.1"))
    if source != target:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


DAMAGES: list[Callable[[Path, random.Random], None]] = [flip, flip, cut, grow, scramble, lose, replace, from_another]
FOLDERS = [move_checkpoint, copy_checkpoint]


def damage(run: Path, seed: int) -> str:
    """Break one thing, and say what."""
    draw = random.Random(seed)
    files = sorted(p for p in run.rglob("*") if p.is_file() and not p.name.startswith("events."))
    inside = [p for p in files if p.parent.name.startswith("step-")]
    how: Callable[[Path, random.Random], None]
    if draw.random() < 0.2:
        how, path = draw.choice(FOLDERS), draw.choice(inside)
    else:
        how, path = draw.choice(DAMAGES), draw.choice(files if draw.random() < 0.4 else inside)
    how(path, draw)
    return f"seed {seed}: {how.__name__} of {path.relative_to(run)}"


def survive(source: Runs, end: str, folder: Path, seed: int) -> bool:
    """Whether the run went on to the same bits; else it must have ended in one line, with its checkpoints there."""
    shutil.copytree(source.folder, folder, symlinks=True)
    runs = Runs(folder)
    runs.images = source.images
    what = damage(folder / "run", seed)
    before = {p.name for p in (folder / "run" / "checkpoints").glob("step-*")}
    with redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()):
        code = main(runs.arguments("train"))
    err = said.getvalue()
    if code == 0:
        assert digest(folder / "run") == end, what
        return True
    assert code == 2 or (code == EXIT_NOT_SAVED and "of export/" in what), (what, err)
    errors = [line for line in err.splitlines() if line.startswith("ghostmask: ") and "warning" not in line][-1:]
    assert len(errors) == 1, (what, err)
    assert "Traceback" not in err, what
    assert len(errors[0]) < 1500, what
    assert before <= {p.name for p in (folder / "run" / "checkpoints").glob("step-*")}, what
    return False


def survive_some(world: World, source: str, end: str, folder: str, first: int, last: int) -> int:
    """How many of the seeds first to last - 1 went on. In a process of its own: what main() leaves behind adds up."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))  # /dev/zero is endless
    lease.SILENCE_S = 0.5
    for name in LAUNCH:
        os.environ.pop(name, None)
    dist.destroy_process_group()
    went_on = 0
    for seed in range(first, last):
        copy = Path(folder) / f"copy{seed}"
        went_on += survive(Runs(Path(source)), end, copy, seed)
        shutil.rmtree(copy)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the caller to leave
    return went_on


@pytest.mark.parametrize("seed", range(PATIENCE))
def test_a_damaged_run_goes_on_to_the_same_bits_or_ends_in_one_line(
    seed: int, half_done: tuple[Runs, str], tmp_path: Path
) -> None:
    survive(*half_done, tmp_path / "copy", seed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_campaign_of_damages(half_done: tuple[Runs, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, end = half_done
    went_on = 0
    for first in range(PATIENCE, PATIENCE + CAMPAIGN, 50):
        arguments = (str(runs.folder), end, str(tmp_path), first, first + 50)
        went_on += run_distributed(survive_some, 1, *arguments, timeout_s=900)[0]
    with capsys.disabled():
        print(f"\n{CAMPAIGN} damages: {went_on} went on to the same bits, {CAMPAIGN - went_on} ended in one line")
    assert went_on > CAMPAIGN / 2
