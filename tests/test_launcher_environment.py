"""Do processes that the launcher prepares use the processor's whole vectors, with the same numbers?"""

from __future__ import annotations

import subprocess
import sys

import pytest
from llvmlite import binding

MASKED = """
import hashlib, sys
if sys.argv[1] == "prepared":
    from ghostmask.launcher.environment import prepare_environment
    prepare_environment("cpu")
import numba, torch
from ghostmask.masks.kernels.relaxed_mask import gradients_, masked_
generator = torch.Generator().manual_seed(0)
w, s, g = (torch.rand(5000, generator=generator) for _ in range(3))
out, grad_s = torch.empty(5000), torch.empty(5000)
masked_(out, w, s, 0, 7, 0.3)
gradients_(g, w, s, 0, 7, 0.3, grad_s)
total = numba.njit(lambda x: x * x + x)
total(g.numpy())
print(hashlib.sha1(b"".join(t.numpy().tobytes() for t in (out, g, grad_s))).hexdigest())
print(any("zmm" in text for text in total.inspect_asm().values()))
"""


def lines(how: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", MASKED, how], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not binding.get_host_cpu_features().get("avx512f"), reason="this processor has no AVX-512")
def test_kernels_take_whole_avx512_registers_and_give_the_same_bits() -> None:
    prepared, plain = lines("prepared"), lines("plain")
    assert prepared[0] == plain[0]
    assert prepared[1] == "True"
