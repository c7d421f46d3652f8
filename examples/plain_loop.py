"""A plain PyTorch loop, made sparse: the lines that do it end in `# sparse`. Trains a torchvision network on toy
images."""

from __future__ import annotations

import torch
from torch.nn import functional
from torchvision.models import resnet18

import ghostmask  # sparse

STEPS, CLASSES = 40, 4
torch.manual_seed(0)
patterns = torch.randn(CLASSES, 3, 32, 32)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """32 noisy pictures of the patterns, and which they are."""
    labels = torch.randint(CLASSES, (32,))
    return patterns[labels] + torch.randn(32, 3, 32, 32), labels


net = resnet18(num_classes=CLASSES)
# The next line was: optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
optimizer = ghostmask.optimizer(net, ghostmask.probmask(0.05, STEPS, lr=0.1), lr=0.05, clip=3.0)  # sparse
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

net.train()
for step in range(STEPS):
    images, labels = batch()
    optimizer.zero_grad()
    loss = functional.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 10 == 0:
        print(f"step {step}  loss {float(loss.detach()):.3f}")

optimizer.eval()  # sparse: from here on the network holds the weights of the mask
with torch.no_grad():
    for _ in range(10):  # sparse
        net(batch()[0])  # sparse: batch norm gets used to them
    net.eval()
    images, labels = batch()
    accuracy = (net(images).argmax(1) == labels).float().mean()
zeros = sum(int((p == 0).sum()) for p in net.parameters() if p.ndim > 1)
total = sum(p.numel() for p in net.parameters() if p.ndim > 1)
print(f"accuracy {accuracy:.0%}, {total - zeros:,} of {total:,} weights left")
torch.save(net.state_dict(), "sparse_resnet18.pt")
