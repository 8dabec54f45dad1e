"""A model that fits no process by itself: FSDP2 around sparse layers, whole for the moment of a switch.

    torchrun --nproc-per-node 2 examples/fsdp.py

Each process keeps a shard of values and moments. `vspdf.gathered` makes them whole, and shards the model anew after.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import vspdf

dist.init_process_group()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
phases = vspdf.Phases([(0.9, 60, 3e-3), (0.0, 30, 3e-4)])
phases.start(model)  # before it is sharded
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=3e-4)
scheduler = phases.scheduler(optimizer)

data = torch.Generator().manual_seed(dist.get_rank())
target = torch.randn(64, 64, generator=torch.Generator().manual_seed(7)) / 8
for step in range(90):
    if phases.due(step):
        with vspdf.gathered(model, optimizer):
            phases.at(step, model, optimizer)
    x = torch.randn(32, 64, generator=data)
    loss = (model(x) - x @ target).square().mean()
    loss.backward()
    phases.step(optimizer)
    scheduler.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 30 == 29:
        local = sum(p.to_local().numel() for p in model.parameters())
        print(f"step {step + 1}: loss {loss.item():.4f}, {local:,} weights on this process")
dist.destroy_process_group()
