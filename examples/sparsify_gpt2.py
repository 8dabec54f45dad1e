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
torch.manual_seed(0)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 90
switch = steps * 2 // 3
text = torch.tensor(list(Path(pickletools.__file__).read_bytes()))
batches = text[: len(text) // 512 * 512].view(-1, 4, 128)
held_out, *batches = batches[torch.randperm(len(batches))]
config = transformers.GPT2Config(
    vocab_size=256, n_positions=128, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
)


def report(step):
    loss = model.eval()(held_out, labels=held_out).loss.item()
    print(f"step {step}: held-out loss {loss:.3f}, {sum(p.numel() for p in model.train().parameters()):,} weights")


model = transformers.GPT2LMHeadModel(config)  # or .from_pretrained("gpt2"), with a tokenizer
phases = vspdf.Phases([(0.9, switch, 3e-3), (0.0, steps - switch, 3e-4)])  # sparsity, steps, peak of the learning rate
phases.start(model)
optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=3e-4, betas=(0.9, 0.95))
scheduler = phases.scheduler(optimizer)  # warms up at the start and again after the switch
for step, batch in zip(range(steps), batches, strict=False):
    phases.at(step, model, optimizer)  # at the switch: masked weights become zeros that learn, moments are carried over
    model(batch, labels=batch).loss.backward()
    phases.step(optimizer), scheduler.step(), optimizer.zero_grad()
    if step + 1 in (1, switch, steps):
        report(step + 1)
