"""Do checkpoints come back bit for bit, on any number of ranks, whatever was done to the tensors meanwhile?"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ghostmask.engine.checkpoint.files import checkpoints
from ghostmask.engine.checkpoint.index import from_json
from ghostmask.engine.checkpoint.store import CheckpointError, CheckpointStore, Piece, PlanError, Saved
from ghostmask.engine.errors import EXIT_NON_FINITE, RunStopped
from ghostmask.engine.spawn import PRELOAD, fork_server, run_distributed
from ghostmask.engine.world import World, single

CUTS = {1: [0, 101], 2: [0, 1, 101], 3: [0, 37, 37, 101], 4: [0, 0, 64, 100, 101]}
"""Where a tensor of 101 elements is cut for so many ranks: odd places, and ranks that own nothing."""
REPLICATED: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "weight/layer1.0.conv1.weight": ((3, 2, 5), torch.float32),
    "bn/num_batches": ((), torch.int64),
    "mask/keep": ((7,), torch.bool),
    "half": ((2, 2), torch.bfloat16),
    "nothing": ((0,), torch.float32),
}


def values(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, step: int = 0) -> Tensor:
    """What tensor `name` holds at `step`."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randint(0, 1 << 20, shape, generator=generator).to(torch.float64).div(7).to(dtype)


def cut(world: World, full: Tensor) -> Piece:
    """This rank's piece of a tensor of 101 elements."""
    start, end = CUTS[world.size][world.rank : world.rank + 2]
    return Piece(101, start, full[start:end].clone())


def full_state(world: World, step: int = 0, sharded: bool = True) -> dict[str, Tensor | Piece]:
    """Replicated tensors, pieces, and two tensors of which one is sharded while the other is not."""
    state: dict[str, Tensor | Piece] = {
        name: values(name, shape, dtype, step) for name, (shape, dtype) in REPLICATED.items()
    }
    state["momentum"] = cut(world, values("momentum", (101,), step=step))
    for name in ("a", "b"):
        full = values(name, (101,), step=step)
        state[name] = cut(world, full) if (name == "a") == sharded else full
    if world.rank == world.size - 1:
        state["owned by the last rank"] = Piece(3, 0, values("last", (3,), step=step))
    return state


def content(state: Mapping[str, Tensor | Piece]) -> dict[str, Tensor]:
    """The tensors themselves."""
    return {name: value.tensor if isinstance(value, Piece) else value for name, value in state.items()}


def save_state(world: World, folder: Path, step: int) -> None:
    """Save full_state."""
    store = CheckpointStore(folder, world)
    store.save(step, full_state(world, step), {"ranks": world.size, "rates": [0.1, None]})
    assert store.wait()
    store.close()


def load_state(world: World, folder: Path, step: int) -> None:
    """Load into zeros, sharded the other way round, and compare with what was saved."""
    store = CheckpointStore(folder, world)
    saved = store.latest()
    assert saved is not None
    assert (saved.step, saved.meta["rates"]) == (step, [0.1, None])
    wanted = full_state(world, step, sharded=False)
    read = {
        name: Piece(v.full_numel, v.start, torch.zeros_like(v.tensor)) if isinstance(v, Piece) else torch.zeros_like(v)
        for name, v in wanted.items()
    }
    store.load(saved, read)
    for name, tensor in content(read).items():
        assert torch.equal(tensor, content(wanted)[name]), name
    store.close()


@pytest.mark.parametrize(("size", "others"), [(1, [3]), (3, [1, 2, 4])])
def test_what_some_ranks_saved_any_number_of_ranks_loads_bit_for_bit(
    size: int, others: list[int], tmp_path: Path
) -> None:
    run_distributed(save_state, size, tmp_path, size)
    load_state(single(), tmp_path, size)
    for other in others:
        run_distributed(load_state, other, tmp_path, size)


def sizes_written(world: World, folder: Path) -> None:
    store = CheckpointStore(folder, world)
    numel = 400_000 // world.size
    store.save(0, {"s": Piece(400_000, numel * world.rank, torch.rand(numel))}, {})
    store.close()


def test_the_bytes_that_a_rank_writes_fall_as_one_over_the_ranks(tmp_path: Path) -> None:
    for size in (1, 2, 4):
        run_distributed(sizes_written, size, tmp_path / str(size))
        written = [file.stat().st_size for file in (tmp_path / str(size)).glob("step-*/*.distcp")]
        assert written == pytest.approx([1_600_000 / size] * size, rel=0.01)


def refuse(world: World, folder: Path) -> None:
    store = CheckpointStore(folder, world)
    rank = world.rank
    wrong: list[tuple[str, Tensor | Piece]] = [
        ("no rank owns elements 5..6 of 11", Piece(11, 6 * rank, torch.ones(5))),
        ("no rank owns elements 10..11 of 11", Piece(11, 5 * rank, torch.ones(5))),
        ("no rank owns elements 0..2 of 4", Piece(4, 2, torch.ones(2))),
        ("several ranks own elements 3..5 of 8", Piece(8, 3 * rank, torch.ones(5))),
        ("differs between ranks", torch.ones(3 + rank)),
        ("differs between ranks", torch.ones(3, dtype=[torch.float32, torch.int64][rank])),
    ]
    for message, value in wrong:
        store.save(1, {"s/conv": value}, {})
        with pytest.raises(PlanError, match=f"^s/conv.* *{message}"):
            store.wait()
    left = [entry.name for entry in folder.iterdir() if entry.name != ".lock"]
    assert not left, left
    world.barrier()  # nobody begins the next save while another still looks
    store.save(1, {"s/conv": Piece(10, 5 * rank, torch.ones(5))}, {})
    assert store.wait()
    store.close()


def test_tensors_that_leave_a_gap_overlap_or_disagree_are_refused_on_every_rank(tmp_path: Path) -> None:
    run_distributed(refuse, 2, tmp_path)


def test_one_rank_alone_may_leave_no_gap_either(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, single())
    store.save(1, {"s": Piece(10, 0, torch.ones(9))}, {})
    with pytest.raises(PlanError, match=r"s: no rank owns elements 9\.\.10 of 10"):
        store.wait()


def mismatch(world: World, folder: Path) -> None:
    store = CheckpointStore(folder, world, asynchronous=False)
    store.save(3, {"a": torch.ones(4), "b": torch.ones(2, 2), "c": torch.ones(3)}, {})
    saved = store.latest()
    assert saved is not None
    a = torch.zeros(4)
    cases: list[tuple[str, Tensor | Piece]] = [
        ("x is not in it", torch.zeros(4)),
        (r"b has shape \(2, 2\) in it and \(4,\) here", Piece(4, 0, torch.zeros(4))),
        (r"c has shape \(3,\) in it and \(4,\) here", torch.zeros(4)),
        (r"c is torch.float32 in it and torch.int64 here", torch.zeros(3, dtype=torch.int64)),
    ]
    for message, value in cases:
        # Only the last rank asks for the wrong thing; all must hear of it.
        asked = {"a": a, message[0]: value} if world.rank == world.size - 1 else {"a": a}
        with pytest.raises(CheckpointError, match=f"step-00000003: .*{message}"):
            store.load(saved, asked)
        assert not a.any()
    store.load(saved, {"a": a})
    assert a.all()
    store.close()


def test_a_missing_or_misshaped_name_is_an_error_that_names_it_and_changes_no_tensor(tmp_path: Path) -> None:
    run_distributed(mismatch, 2, tmp_path)


def test_a_save_holds_the_values_of_its_moment_while_training_goes_on(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, single(), keep=3)
    weight, meta = torch.zeros(4_000_000), {"step": 0}
    for step in (1, 2, 3):
        weight.fill_(step)
        meta["step"] = step
        store.save(step, {"w": Piece(4_000_000, 0, weight)}, meta)
        weight.fill_(-1)
        meta["step"] = -1
    store.wait()
    for step in (1, 2, 3):
        path = tmp_path / f"step-{step:08d}"
        store.load(Saved(path, step, {}), {"w": weight})
        assert torch.equal(weight, torch.full_like(weight, step))
        assert f'"step": {step}' in (path / "meta.json").read_text()


def test_close_finishes_the_save_and_leaves_no_thread(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, single())
    store.save(7, {"w": torch.ones(1_000_000)}, {})
    store.close()
    assert (tmp_path / "latest").read_text() == "step-00000007\n"
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]


def leave(folder: Path) -> None:
    """End the process with a save under way."""
    CheckpointStore(folder, single()).save(1, {"w": torch.ones(20_000_000)}, {})


def test_a_process_that_ends_without_close_still_finishes_its_save(tmp_path: Path) -> None:
    context = fork_server(*PRELOAD)
    process = context.Process(target=leave, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, single(), keep=2)
    for step in (1, 2, 30, 4_000_000_000):
        store.save(step, {"w": torch.ones(1)}, {})
    store.close()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4000000000", "step-00000030"]
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_file()) == ["latest"]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, single(), keep=2)
    for step in (1, 2):
        store.save(step, {"w": torch.ones(100)}, {})
    store.wait()
    data = bytearray((tmp_path / "step-00000002/__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "step-00000002/__0_0.distcp").write_bytes(data)
    fresh = CheckpointStore(tmp_path, single(), keep=2, warn=lambda _: None)
    saved = fresh.latest()
    assert saved is not None
    assert saved.step == 1
    fresh.save(3, {"w": torch.ones(100)}, {})
    fresh.wait()
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "2", "1"]
    fresh.save(4, {"w": torch.ones(100)}, {})
    fresh.wait()
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["4", "3"]


def test_saving_a_step_again_puts_the_new_one_in_place_of_the_old(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, single(), keep=2)
    weight = torch.zeros(3)
    for value in (1, 2, 3):
        store.save(5, {"w": weight.fill_(value)}, {"phase": value})
    saved = store.latest()
    assert saved is not None
    assert (saved.step, saved.meta["phase"]) == (5, 3)
    assert checkpoints(tmp_path) == [saved.path]
    store.load(saved, {"w": weight.zero_()})
    assert weight.tolist() == [3, 3, 3]
    assert (tmp_path / "latest").read_text().strip() == saved.path.name


def test_leftovers_of_killed_runs_go_with_the_next_save(tmp_path: Path) -> None:
    leftovers = [tmp_path / ".writing-step-00000009-ab", tmp_path / ".deleting-step-00000001-cd"]
    for path in leftovers:
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"half")
    store = CheckpointStore(tmp_path, single())
    store.save(2, {"w": torch.ones(1)}, {})
    assert store.wait()
    assert not any(path.exists() for path in leftovers)


def test_saving_and_loading_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_state(single(), tmp_path, 1)
        load_state(single(), tmp_path, 1)
    assert [str(warning.message) for warning in caught] == []
    assert capfd.readouterr() == ("", "")


def test_an_empty_or_absent_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path, single()).latest() is None
    assert CheckpointStore(tmp_path / "none", single()).latest() is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("start", "shape"), [(-1, (3,)), (8, (3,)), (0, (3, 1)), (0, ())])
def test_a_piece_lies_inside_its_tensor(start: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"outside a tensor of 10|one-dimensional"):
        Piece(10, start, torch.zeros(shape))


def poisoned(world: World, folder: Path) -> tuple[int, str, list[str]]:
    """A value of one rank's piece is not finite: what every rank is told, and what is left."""
    store = CheckpointStore(folder, world)
    store.save(1, {"w": torch.ones(2)}, {})
    value = torch.ones(3)
    if world.rank == 1:
        value[2] = float("nan")
    store.save(2, {"w": torch.ones(2), "s": Piece(6, 3 * world.rank, value)}, {})
    try:
        store.wait()
    except RunStopped as stop:
        store.close()
        return stop.exit_code, str(stop), sorted(path.name for path in folder.iterdir())
    raise AssertionError("a checkpoint with nan in it was made")


def test_a_value_that_is_not_finite_is_never_saved_and_every_rank_knows(tmp_path: Path) -> None:
    one, two = run_distributed(poisoned, 2, tmp_path)
    assert one == two
    code, text, left = one
    assert code == EXIT_NON_FINITE
    assert text.startswith("s is not finite at step 2: no checkpoint was made of it; start a new run from the last")
    assert left == ["latest", "step-00000001"]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", b"\x80\x04cposix\nsystem\n", '{"tensors": {"w": 1}}',
        '{"tensors": {"w": {"dtype": "load", "size": [1], "chunks": []}}}',
        '{"tensors": {"w": {"dtype": "float32", "size": [1], "chunks": [{"offset": [0], "size": [1], "file": "../w", '
        '"start": 0, "bytes": 1}]}}}',
    ],
)  # fmt: skip
def test_an_index_that_is_none_executes_nothing_and_leads_nowhere_else(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"no index|no type of numbers|lies in|Expecting|decode"):
        from_json(text)
