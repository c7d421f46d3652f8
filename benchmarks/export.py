"""What does a sparse network bring to whoever runs it: size and latency of each exported form beside the dense one?

Every form is loaded from its folder, as a reader would, and run on the same batch, in turns, on one thread and on all
cores. The dense network is the same one with a number in place of each zero.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ghostmask.benchmarks.row import Row, faster, share
from ghostmask.benchmarks.timing import Bench, Work, interleaved

CUDA_BATCH = 64
DENSE = "dense"
SAFETENSORS = "safetensors"


@dataclass(frozen=True)
class Form:
    """folder: with its files; load: the lines of its model card, which define `net` there; bytes: of what is sent."""

    folder: Path
    load: str
    bytes: int


@dataclass(frozen=True)
class Exports:
    """forms: by format, of one network and, under "dense" and "dense_onnx", of the dense one; image_shape: of one."""

    forms: Mapping[str, Form]
    image_shape: tuple[int, int, int]


def rows(bench: Bench) -> list[Row]:
    """Cases export_size, export_read, export_1_thread, export_all_cores; on CUDA export_cuda for the last two."""
    exports = bench.exports
    assert exports is not None, "ghostmask bench export says which"
    found = _sizes(exports) + _reading(exports)
    cuda = bench.device.type == "cuda"
    images = torch.randn(CUDA_BATCH if cuda and not bench.quick else 1, *exports.image_shape)
    with torch.no_grad():
        if cuda:
            return found + _latency(
                _on_cuda(exports, images, bench), "export_cuda", bench, f"batch {len(images)}, half"
            )
        cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
        for case, threads in (("export_1_thread", 1), ("export_all_cores", cores)):
            torch.set_num_threads(threads)
            bench.world.pulse.enter(f"benchmark export: {case}")
            found += _latency(_on_cpu(exports, images, threads, bench.quick), case, bench, f"batch {len(images)}")
        torch.set_num_threads(before)
    return found


def load(form: Form) -> Callable[[Tensor], Any]:
    """`net`, as the lines of the form's card define it."""
    space: dict[str, Any] = {}
    sys.path.insert(0, str(form.folder.absolute()))
    try:
        sys.modules.pop("network", None)
        with chdir(form.folder):
            exec(form.load, space)
    finally:
        sys.path.pop(0)
    net: Callable[[Tensor], Any] = space["net"]
    return net


def _sizes(exports: Exports) -> list[Row]:
    whole = exports.forms[DENSE].bytes / 1e6
    return [
        share("export_size", form.bytes / 1e6, whole, "MB", f"{name}; baseline: {DENSE}, float32")
        for name, form in exports.forms.items()
    ]


def _reading(exports: Exports) -> list[Row]:
    found = []
    for name, form in exports.forms.items():
        if name == SAFETENSORS or name.startswith("packed"):
            load(form)  # imports
            start = perf_counter()
            load(form)
            found.append(Row("export_read", 1000 * (perf_counter() - start), "ms", note=f"{name}: build and fill it"))
    return found


def _latency(work: dict[str, Work], case: str, bench: Bench, what: str) -> list[Row]:
    """A row for each piece of work, beside `dense`."""
    repeats = 2 if bench.quick else 30 if bench.device.type == "cuda" else 15
    seconds = interleaved(work, repeats, bench.device, warm_up=1 if bench.quick else 3)
    dense = 1000 * seconds[DENSE]
    note = f"{what}; baseline: {DENSE}, float32, eager"
    return [faster(case, 1000 * value, dense, "ms", f"{name}; {note}") for name, value in seconds.items()]


def _on_cpu(exports: Exports, images: Tensor, threads: int, quick: bool) -> dict[str, Work]:
    forms, work = exports.forms, dict[str, Work]()
    nets = {name: load(forms[name]) for name in (DENSE, SAFETENSORS, "small") if name in forms}
    for name, net in nets.items():
        assert isinstance(net, nn.Module)
        work[name] = _call(net, images)
        work[f"{name}, channels_last"] = _call(load(forms[name]), images, channels_last=True)
        if not quick and name != SAFETENSORS:
            work[f"{name}, compiled"] = _call(torch.compile(net, dynamic=False), images)
    if "small" in forms:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is on its way out
            script = torch.jit.load(str(forms["small"].folder / "model.torchscript"))  # type: ignore[no-untyped-call]
        program = torch.export.load(str(forms["small"].folder / "model.pt2")).module()
        work |= {"small, TorchScript": _call(script, images), "small, torch.export": _call(program, images)}
    for name in ("dense_onnx", "onnx"):
        if name in forms and find_spec("onnxruntime"):
            work[f"{name}, ONNX Runtime"] = _session(forms[name].folder / "model.onnx", images, threads)
    return work


def _call(net: Any, images: Tensor, *, channels_last: bool = False) -> Work:
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    return lambda: net(images)


def _session(file: Path, images: Tensor, threads: int) -> Work:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads go on spinning after a run, on the cores of what is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)


def _on_cuda(exports: Exports, images: Tensor, bench: Bench) -> dict[str, Work]:
    """In half precision and channels_last; never run on a GPU so far (docs/performance.md)."""
    forms, work = exports.forms, dict[str, Work]()
    images = images.to(bench.device, torch.float16, memory_format=torch.channels_last)
    for name in (DENSE, "small", "2:4"):
        if name not in forms:
            continue
        net: Any = load(forms[name])
        if name != "2:4":  # whose lines move it by themselves, and whose weights know no other order
            net = net.to(bench.device, torch.float16, memory_format=torch.channels_last)
        work[name] = _call(net, images)
        if not bench.quick:
            work[f"{name}, compiled"] = _call(torch.compile(net, dynamic=False), images)
    return work
