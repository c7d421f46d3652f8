"""Somebody's own DeepSpeed script, made sparse: the lines that do it end in `# sparse`. Start it with torchrun."""

from __future__ import annotations

import os

import deepspeed
import torch
import torch.distributed as dist
from torch.nn import functional
from torchvision.models import mobilenet_v2

import ghostmask  # sparse

STEPS, CLASSES, PER_RANK = 30, 4, 16
CONFIG = {
    "train_micro_batch_size_per_gpu": PER_RANK,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}

deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
torch.manual_seed(0)
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
net = mobilenet_v2(num_classes=CLASSES).to(device)
patterns = torch.randn(CLASSES, 3, 32, 32, device=device)

method = ghostmask.gmp(density=0.1, steps=STEPS, every=5)  # sparse
optimizer = ghostmask.optimizer(net, method, lr=0.05, place=False)  # sparse (was: torch.optim.SGD(...))
engine = ghostmask.initialize(net, optimizer, CONFIG)  # sparse (was: deepspeed.initialize(...))

torch.manual_seed(1 + dist.get_rank())
for step in range(STEPS):
    labels = torch.randint(CLASSES, (PER_RANK,), device=device)
    images = patterns[labels] + 0.5 * torch.randn(PER_RANK, 3, 32, 32, device=device)
    loss = functional.cross_entropy(engine(images), labels)
    engine.backward(loss)
    engine.step()
    if step % 10 == 0 and dist.get_rank() == 0:
        print(f"step {step}  loss {float(loss):.3f}")

optimizer.give_back()  # sparse: plain float32 parameters, pruned ones 0
if dist.get_rank() == 0:
    weights = [m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    kept, total = sum(int((w != 0).sum()) for w in weights), sum(w.numel() for w in weights)
    print(f"{kept:,} of {total:,} weights left")
dist.destroy_process_group()
