"""Sparsify a Hugging Face GPT-2, train it, densify it, train on: ten lines, from `model` to the end of the loop.

    python examples/sparsify_gpt2.py [STEPS]

Runs offline in seconds: a GPT-2 of 3.3M parameters, freshly initialised, on the bytes of a Python module.
"""

import pickletools
import sys
from pathlib import Path

import torch
import transformers

import vspdf

transformers.logging.set_verbosity_error()
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 90
text = torch.tensor(list(Path(pickletools.__file__).read_bytes()))
batches = text[: len(text) // 512 * 512].view(-1, 4, 128)
batches = batches[torch.randperm(len(batches))]
config = transformers.GPT2Config(
    vocab_size=256, n_positions=128, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
)

model = transformers.GPT2LMHeadModel(config)  # or .from_pretrained("gpt2"), with a tokenizer
vspdf.sparsify(model, 0.9)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
for step, batch in zip(range(steps), batches, strict=False):
    if step == steps * 5 // 6:
        vspdf.densify(model, optimizer)  # masked weights are zeros that learn; moments are carried over
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, steps * 5 // 6 - 1, steps - 1):
        weights = sum(p.numel() for p in model.parameters())
        print(f"step {step + 1}: loss {loss:.3f}, {weights:,} weights")
