"""Does a run find an intact checkpoint again, whatever was broken: bits, files, processes, the disk?"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostmask.engine.checkpoint.files import checkpoints, read_manifest
from ghostmask.engine.checkpoint.store import CheckpointError, CheckpointStore, Piece
from ghostmask.engine.spawn import PRELOAD, fork_server, run_distributed
from ghostmask.engine.world import World, single

NUMEL = 3000


def state(world: World, step: int, numel: int = NUMEL) -> dict[str, Any]:
    """A tensor in pieces and a replicated one, both functions of the step."""
    start, end = numel * world.rank // world.size, numel * (world.rank + 1) // world.size
    return {
        "s": Piece(numel, start, torch.arange(start, end, dtype=torch.float32) + step),
        "w": torch.full((2, 3), float(step)),
    }


def save(world: World, folder: Path, *steps: int) -> None:
    """Save these steps, all kept."""
    store = CheckpointStore(folder, world, keep=9)
    for step in steps:
        store.save(step, state(world, step), {"step": step})
        assert store.wait()
    store.close()


def load(folder: Path, numel: int = NUMEL) -> tuple[int | None, list[str]]:
    """(step of the newest intact checkpoint, whose content is as saved; the warnings)."""
    said: list[str] = []
    store = CheckpointStore(folder, single(), warn=said.append)
    saved = store.latest()
    if saved is None:
        return None, said
    read = {"s": torch.empty(numel), "w": torch.empty(2, 3)}
    store.load(saved, read)
    assert torch.equal(read["s"], torch.arange(numel) + saved.step)
    assert read["w"].unique().tolist() == [saved.step]
    assert saved.meta == {"step": saved.step, "run": ""}
    return saved.step, said


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff{}[")


FILES = ["__0_0.distcp", "index.json", "meta.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [half, empty, garbage, Path.unlink])
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(
    damage: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    save(single(), tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / file)
    step, said = load(tmp_path)
    assert step == 1
    assert len(said) == 1
    assert str(tmp_path / "step-00000002") in said[0]
    assert file in said[0]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    save(single(), tmp_path, 1, 2)
    draw = random.Random(0)
    for _ in range(60):
        file = tmp_path / "step-00000002" / draw.choice(FILES)
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        assert load(tmp_path)[0] == 1, (file.name, bit)
        flip(file, bit)
    assert load(tmp_path) == (2, [])


@pytest.mark.parametrize("pointer", ["step-00000009\n", "", "\x00../..", None, "step-00000001\n"])
def test_the_newest_is_found_whatever_the_pointer_says(pointer: str | None, tmp_path: Path) -> None:
    save(single(), tmp_path, 1, 2)
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    assert load(tmp_path) == (2, [])


def test_where_none_is_intact_it_is_an_error_and_the_folder_stays_as_it_is(tmp_path: Path) -> None:
    save(single(), tmp_path, 1, 2)
    flip(tmp_path / "step-00000001/__0_0.distcp", 5555)
    (tmp_path / "step-00000002/meta.json").unlink()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(
        CheckpointError, match=r"none of its 2 .*step-00000002: meta.json is missing; step-00000001: __0"
    ):
        load(tmp_path)
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before


def look(world: World, folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    store = CheckpointStore(folder, world, warn=said.append)
    saved = store.latest()
    store.close()
    return saved.step if saved else None, said


def test_ranks_agree_on_damage_that_one_of_them_found(tmp_path: Path) -> None:
    run_distributed(save, 2, tmp_path, 1, 2)
    # The ranks share the files out: each of the two checks one of these.
    for file in ("__0_0.distcp", "__1_0.distcp"):
        flip(tmp_path / "step-00000002" / file, 5555)
        (step, said), other = run_distributed(look, 2, tmp_path)
        flip(tmp_path / "step-00000002" / file, 5555)
        assert (step, other) == (1, (1, []))
        assert [file in text for text in said] == [True]


def die_at(folder: Path, step: int, event: int) -> None:
    """Save `step`, but be killed at the given open, rename, mkdir or remove inside the folder."""
    seen = 0

    def watch(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        acts = name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
            name == "open" and args[1] not in (None, "r")
        )
        if acts and str(folder) in str(args[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    store = CheckpointStore(folder, single(), keep=1)
    sys.addaudithook(watch)
    store.save(step, state(single(), step), {"step": step})
    store.close()


def test_a_kill_at_any_operation_of_a_save_leaves_the_old_or_the_new_checkpoint_whole(tmp_path: Path) -> None:
    context = fork_server(*PRELOAD)
    outcomes: list[int | None] = []
    for event in range(1, 100):
        folder = tmp_path / str(event)
        save(single(), folder, 1)
        process = context.Process(target=die_at, args=(folder, 2, event))
        process.start()
        process.join()
        step, said = load(folder)
        assert said == []
        assert (folder / (folder / "latest").read_text().strip()).is_dir()
        for path in checkpoints(folder):
            read_manifest(path)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        outcomes.append(step)
        save(single(), folder, 3)
        assert load(folder) == (3, [])
        assert not list(folder.glob(".[wd]*-*"))
    # Killed early the old one counts, killed late the new one; and the loop saw the whole save.
    assert outcomes == sorted(outcomes, key=int)
    assert outcomes[0] == 1
    assert outcomes[-1] == 2
    assert len(outcomes) > 10
    assert step == 2


def save_until_killed(world: World, folder: Path, progress: Path, victim: int, after_s: float) -> None:
    """Save without end; one rank kills itself some time after the first checkpoint."""
    store = CheckpointStore(folder, world)
    for step in range(1, 10_000):
        store.save(step, state(world, step, 400_000), {"step": step})
        assert store.wait()
        if world.is_main:
            with progress.open("ab", buffering=0) as file:
                file.write(b"%d\n" % step)
        world.barrier()
        if step == 1 and world.rank == victim:
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()


def kill_at_random(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    folder.mkdir()
    with pytest.raises(RuntimeError):
        run_distributed(save_until_killed, 2, folder, folder / "progress", seed % 2, 0.3 * draw.random())
    step, said = load(folder, 400_000)
    assert said == []
    assert step is not None
    assert step - int((folder / "progress").read_text().split()[-1]) in (0, 1)


def test_a_rank_killed_while_saving_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    for seed in range(3):
        kill_at_random(tmp_path / str(seed), seed)


@pytest.mark.soak
def test_many_ranks_killed_while_saving_leave_an_intact_checkpoint(tmp_path: Path) -> None:
    for seed in range(3, 43):
        kill_at_random(tmp_path / str(seed), seed)


def fill_up(world: World, disk: Path) -> list[str]:
    said: list[str] = []
    folder = disk / "checkpoints"
    store = CheckpointStore(folder, world, warn=said.append)
    store.save(1, state(world, 1, 200_000), {"step": 1})
    assert store.wait()
    if world.is_main:
        (disk / "ballast").write_bytes(bytes(2_800_000))
    world.barrier()
    for _ in range(2):
        store.save(2, state(world, 2, 200_000), {"step": 2})
        assert not store.wait()
        assert (folder / "latest").read_text() == "step-00000001\n"
        assert not list(folder.glob(".writing-*"))
        world.barrier()
    saved = store.latest()
    assert saved is not None
    assert saved.step == 1
    if world.is_main:
        (disk / "ballast").unlink()
    world.barrier()
    store.save(3, state(world, 3, 200_000), {"step": 3})
    assert store.wait()
    store.close()
    return said


def test_a_full_disk_is_reported_once_per_save_and_training_goes_on(small_disk: Path) -> None:
    said, other = run_distributed(fill_up, 2, small_disk)
    assert other == []
    assert len(said) == 2
    for text in said:
        assert "step 2 could not be saved" in text
        assert str(small_disk / "checkpoints") in text
        assert "No space left on device" in text
    assert load(small_disk / "checkpoints", 200_000) == (3, [])


def test_a_disk_that_is_full_after_any_page_leaves_the_old_or_the_new_checkpoint_whole(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    save(single(), folder, 1)
    results = []
    for pages in range(16):
        free = os.statvfs(small_disk).f_bavail - pages
        (small_disk / "ballast").write_bytes(bytes(4096 * free))
        said: list[str] = []
        store = CheckpointStore(folder, single(), keep=1, warn=said.append)
        store.save(pages + 2, state(single(), pages + 2), {"step": pages + 2})
        done = store.wait()
        results.append(done)
        assert ["No space left" in text for text in said] == [True] * (not done)
        step, damaged = load(folder)
        assert damaged == []
        assert step == pages + 2 if done else step is not None
        (small_disk / "ballast").unlink()
    assert results[0] is False
    assert results[-1] is True
    assert results == sorted(results)


def fail(world: World, folder: Path) -> list[str]:
    said: list[str] = []
    store = CheckpointStore(folder, world, warn=said.append)
    store.save(1, state(world, 1), {})
    assert not store.wait()
    store.close()
    return said


def test_a_folder_that_cannot_be_written_is_reported_on_rank_0_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said, other = run_distributed(fail, 2, tmp_path / "file")
    assert other == []
    assert len(said) == 1
    assert f"File exists: '{tmp_path / 'file'}'" in said[0]
