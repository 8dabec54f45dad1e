"""A loop of your own on several processes: DistributedDataParallel around a model that goes from sparse to dense.

    torchrun --nproc-per-node 2 examples/ddp.py

The masks are the same on every process without any exchange: they come of the seed and a layer's name. At a switch
parameters are replaced, so the model is wrapped anew; gradients of sparse layers travel at nnz.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vspdf

dist.init_process_group()
torch.manual_seed(0)  # the same weights everywhere
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
phases = vspdf.Phases([(0.9, 60, 3e-3), (0.0, 30, 3e-4)])
phases.start(model)
optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=3e-4)
scheduler = phases.scheduler(optimizer)
net = DistributedDataParallel(model)

data = torch.Generator().manual_seed(dist.get_rank())  # each process has samples of its own
target = torch.randn(64, 64, generator=torch.Generator().manual_seed(7)) / 8
for step in range(90):
    if phases.due(step):
        del net  # and with it the old reducer's hooks
        phases.at(step, model, optimizer)
        net = DistributedDataParallel(model)
    x = torch.randn(32, 64, generator=data)
    loss = (net(x) - x @ target).square().mean()
    loss.backward()
    phases.step(optimizer)
    scheduler.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 30 == 29:
        print(f"step {step + 1}: loss {loss.item():.4f}, {sum(p.numel() for p in model.parameters()):,} weights")
dist.destroy_process_group()
