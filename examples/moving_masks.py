"""Masks that move: the same small GPT under static masks, SET, RigL and gradual pruning, on the same batches.

    python examples/moving_masks.py [STEPS]

Runs offline in half a minute: a GPT of 0.4M weights on the bytes of a Python module. So short a run tells nothing of
which is best; `vspdf compare multiplier` does.
"""

import pickletools
import sys
from pathlib import Path

import torch

import vspdf
from vspdf.model import GPT
from vspdf.shapes import Shape

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 120
shape = Shape(n_layer=2, d_model=128, n_head=4, d_ff=512, vocab_size=256, sequence_length=64)
text = torch.tensor(list(Path(pickletools.__file__).read_bytes()))
batches = text[: len(text) // 520 * 520].view(-1, 8, 65)
held_out, *batches = batches[torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))]

WAYS = {
    "static": {"sparsity": 0.75},
    "set": {"sparsity": 0.75, "algorithm": "set", "drop_fraction": {"type": "cosine", "init": 0.5}},
    "rigl": {"sparsity": 0.75, "algorithm": "rigl"},
    "gmp": {"sparsity": 0.0, "schedule": "power", "sparsity_end": 0.75, "algorithm": "gmp"},
}
for name, settings in WAYS.items():
    model = GPT(shape, init_std=0.044)
    phases = vspdf.Phases([vspdf.Phase(steps=steps, lr=6e-3, **settings)])
    phases.start(model)
    optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=6e-3, betas=(0.9, 0.95))
    scheduler = phases.scheduler(optimizer)
    for step in range(steps):
        phases.at(step, model, optimizer)  # drops the smallest weights, lets others grow, and takes the moments along
        batch = batches[step % len(batches)]
        model(batch[:, :-1], batch[:, 1:]).backward()
        phases.step(optimizer), scheduler.step(), optimizer.zero_grad()
    with torch.no_grad():
        loss = model(held_out[:, :-1], held_out[:, 1:]).item()
    seen = phases.turnover.figures() if phases.turnover else {}
    told = ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in seen.items())
    print(f"{name}: held-out loss {loss:.3f} at a sparsity of {phases.sparsity:.2f}{'; ' if told else ''}{told}")
