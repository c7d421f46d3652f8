"""Are a run's numbers read back as written and once each, also after a kill, by TensorBoard and as JSON lines?"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ghostmask.engine.errors import InputError
from ghostmask.engine.metrics import NUM_BUCKETS, Counts, MetricWriter
from ghostmask.engine.world import World, single


def _lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def _curve(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _events(folder).Scalars(name)]


def test_scalars_reach_both_files_with_tags_in_the_json_line_only(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, single(), None)
    writer.scalars(10, {"train/loss": 0.5, "lr": 0.1}, phase="search", epoch=0)
    writer.scalars(20, {"train/loss": 0.25}, phase="search", epoch=1)
    writer.close()
    assert _lines(tmp_path) == [
        {"step": 10, "phase": "search", "epoch": 0, "train/loss": 0.5, "lr": 0.1},
        {"step": 20, "phase": "search", "epoch": 1, "train/loss": 0.25},
    ]
    assert _curve(tmp_path, "1_result/loss_train") == [(10, 0.5), (20, 0.25)]
    assert sorted(_events(tmp_path).Tags()["scalars"]) == ["1_result/loss_train", "lr"]


def test_accuracy_and_loss_are_the_first_cards_and_layers_are_one_histogram(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, single(), None)
    writer.settings({"optim.lr": 0.1, "tost.lrsi": True, "model.name": "conv4"}, "optim:\n  lr: 0.1\n")
    layers = {f"density/layer{i}.weight": i / 54 for i in range(54)}
    writer.scalars(5, {"acc/other": 1.0, "train/loss": 2.0, "eval/accuracy": 0.5, "density/bad": math.nan, **layers})
    writer.close()
    events = _events(tmp_path)
    scalars = sorted(events.Tags()["scalars"])
    assert scalars == ["1_result/accuracy_eval", "1_result/loss_train", "acc/other"]
    (histogram,) = events.Histograms("density/of_layers")
    assert histogram.histogram_value.num == 54
    assert histogram.histogram_value.max == pytest.approx(53 / 54)
    assert len(_lines(tmp_path)[0]) == 54 + 5  # every layer's number stands in metrics.jsonl
    (text,) = events.Tensors("config/text_summary")
    assert b"lr: 0.1" in text.tensor_proto.string_val[0]
    session = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    found = session.session_start_info.hparams
    assert found["optim.lr"].number_value == 0.1
    assert found["tost.lrsi"].number_value == 1
    assert found["model.name"].string_value == "conv4"


def test_a_run_of_an_older_version_goes_on_where_its_events_are(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.host.1").touch()
    MetricWriter(tmp_path, single(), 10).close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert not list(tmp_path.glob("events*"))


def test_a_line_is_in_the_file_when_the_call_returns(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, single(), None)
    writer.scalars(1, {"loss": 1.0})
    assert len(_lines(tmp_path)) == 1
    writer.close()


def test_values_that_are_not_finite_are_null_in_json_and_themselves_in_tensorboard(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, single(), None)
    writer.scalars(1, {"loss": math.nan, "norm": math.inf, "low": -math.inf}, limit=math.inf)
    writer.close()
    assert _lines(tmp_path) == [{"step": 1, "limit": None, "loss": None, "norm": None, "low": None}]
    assert math.isnan(_curve(tmp_path, "loss")[0][1])
    assert _curve(tmp_path, "norm") == [(1, math.inf)]


def test_a_value_with_the_name_of_a_tag_is_an_error(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, single(), None)
    with pytest.raises(ValueError, match=r"\['epoch', 'step'\]"):
        writer.scalars(1, {"epoch": 1.0, "step": 2.0, "loss": 0.0}, epoch=1)
    writer.close()
    assert _lines(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path / "run", World(1, 2, torch.device("cpu")), 5)
    writer.scalars(1, {"loss": 1.0})
    writer.histogram(1, "s", torch.rand(3))
    writer.flush()
    writer.close()
    assert os.listdir(tmp_path) == []


def test_closing_twice_and_writing_after_it_do_nothing(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, single(), None)
    writer.close()
    writer.close()
    writer.scalars(1, {"loss": 1.0})
    assert _lines(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from ghostmask.engine.metrics import MetricWriter
from ghostmask.engine.world import single
writer = MetricWriter(Path(sys.argv[1]), single(), None)
for step in range(1, 11):
    writer.scalars(step, {"loss": float(step)}, phase="search")
    if step in (6, 10):
        writer.flush()
open(Path(sys.argv[1]) / "metrics.jsonl", "ab").write(b'{"step": 6, "phase": "sea')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_and_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    _next_second()
    writer = MetricWriter(tmp_path, single(), 6)
    for step in range(7, 13):
        writer.scalars(step, {"loss": -float(step)}, phase="search")
    writer.close()
    expected = [(step, float(step) if step <= 6 else -float(step)) for step in range(1, 13)]
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == expected
    assert _curve(tmp_path, "loss") == expected
    assert {name.partition(".out.")[0] for name in os.listdir(tmp_path)} == {"events", "metrics.jsonl"}


def test_a_new_run_in_a_used_folder_starts_both_records_afresh(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        writer = MetricWriter(tmp_path, single(), None)
        writer.scalars(0, {"loss": value})
        writer.scalars(3, {"loss": value})
        writer.close()
        _next_second()
    assert [line["loss"] for line in _lines(tmp_path)] == [2.0, 2.0]
    assert _curve(tmp_path, "loss") == [(0, 2.0), (3, 2.0)]


def test_resuming_keeps_a_whole_last_line_without_a_newline_and_drops_what_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x00\xff\n[3]\n{"loss": 2}\n{"step": 4}\n{"step": 2}')
    MetricWriter(tmp_path, single(), 3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_histogram_equals_numpys(tmp_path: Path) -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    writer = MetricWriter(tmp_path, single(), None)
    writer.histogram(4, "probability", torch.cat([values, torch.tensor([math.nan, math.inf])]).view(2, -1))
    writer.close()
    (event,) = _events(tmp_path).Histograms("probability")
    found, reference = event.histogram_value, values.double().numpy()
    counts, edges = np.histogram(reference, bins=NUM_BUCKETS)
    assert event.step == 4
    assert (found.min, found.max, found.num) == (reference.min(), reference.max(), 20_000)
    assert found.sum == pytest.approx(reference.sum())
    assert found.sum_squares == pytest.approx((reference**2).sum())
    np.testing.assert_allclose(found.bucket_limit, edges[1:], atol=1e-12)
    np.testing.assert_allclose(found.bucket, counts, atol=1)  # a value on an edge may fall to either side
    assert sum(found.bucket) == 20_000


def test_distributions_of_layers_are_one_card_and_one_line_of_all_of_them(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, single(), None)
    layers = {f"probability/layer{i}": Counts([0.25, 0.5, 0.75, 1.0], [3, 0, i % 2, 4], 5.5, 4.25) for i in range(54)}
    writer.histograms(7, layers, phase="search")
    writer.close()
    events = _events(tmp_path)
    assert events.Tags()["histograms"] == ["probability/of_weights"], "one card, not 54"
    (event,) = events.Histograms("probability/of_weights")
    found = event.histogram_value
    assert (event.step, found.num, found.sum, found.sum_squares) == (7, 7 * 54 + 27, 5.5 * 54, 4.25 * 54)
    assert (list(found.bucket_limit), list(found.bucket)) == ([0.25, 0.5, 0.75, 1.0], [3 * 54, 0, 27, 4 * 54])
    (line,) = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line == {"step": 7, "phase": "search", **{name: counts.counts for name, counts in layers.items()}}
    assert (found.min, found.max) == (0.0, 1.0)


def test_histograms_of_constants_are_one_bucket_and_of_nothing_are_left_out(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, single(), None)
    writer.histogram(1, "ones", torch.ones(5, dtype=torch.bool))
    writer.histogram(1, "empty", torch.zeros(0))
    writer.histogram(1, "nan", torch.full((3,), math.nan))
    writer.close()
    events = _events(tmp_path)
    assert events.Tags()["histograms"] == ["ones"]
    found = events.Histograms("ones")[0].histogram_value
    assert (found.num, found.sum, found.bucket_limit, found.bucket) == (5, 5, [1.0], [5.0])


def _next_second() -> None:
    """TensorBoard orders event files by the second in their names; a real restart takes longer than one."""
    time.sleep(1.0 - time.time() % 1.0 + 0.01)


def test_a_full_disk_is_said_once_in_a_while_and_no_line_is_lost(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostmask.engine.appending.REPEAT_S", 3600.0)
    said: list[str] = []
    writer = MetricWriter(small_disk, single(), None, warn=said.append)
    writer.scalars(1, {"loss": 1.0})
    (small_disk / "ballast").write_bytes(bytes(4096 * (os.statvfs(small_disk).f_bavail)))
    for step in range(2, 400):  # the last page of the file takes some of them, one in part
        writer.scalars(step, {"loss": 1.0})
    writer.flush()
    (word,) = [text for text in said if text.startswith(f"{small_disk}/metrics.jsonl cannot be written")]
    assert word.endswith("(No space left on device); training goes on, and so do tries")
    assert len(said) == 2, "the other for TensorBoard's file"
    (small_disk / "ballast").unlink()
    writer.scalars(400, {"loss": 1.0})
    lines = [json.loads(line) for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 401))
    writer.scalars(401, {"loss": 1.0})
    writer.close()
    assert len(said) == 2
    events = EventAccumulator(str(small_disk), {"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 402))


def test_a_start_on_a_full_disk_is_one_line(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(4096 * (os.statvfs(small_disk).f_bavail)))
    with pytest.raises(InputError, match=r"its metrics cannot be written \(No space left on device\)") as caught:
        MetricWriter(small_disk / "run", single(), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_metrics_that_are_no_file_are_one_line_and_not_read_for_ever(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"its metrics cannot be written \((is a|Is a directory)"):
        MetricWriter(tmp_path, single(), 3)


def test_tensorboard_finds_the_settings_in_which_runs_differ(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    for name, lr in (("first", 0.1), ("second", 0.03)):
        writer = MetricWriter(tmp_path / name, single(), None)
        writer.settings({"optim.lr": lr, "seed": 1}, "seed: 1\n")
        writer.scalars(1, {"gradient/norm": 1.0, "eval/accuracy": 0.5})
        writer.close()
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    runs.Reload()
    assert set(runs.Runs()) == {"first", "second"}
    context = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(tmp_path))))
    asked = RequestContext()
    metadata = context.hparams_metadata(asked, "")
    experiment = context.experiment_from_metadata(asked, "", True, metadata, [])
    assert {info.name: info.differs for info in experiment.hparam_infos} == {"optim.lr": True, "seed": False}
    assert experiment.metric_infos[0].name.tag == "1_result/accuracy_eval"
