"""Estimate a training step on a Cerebras CS-2 for a model that is not ours: any Hugging Face folder.

    python examples/estimate_cs2.py [FOLDER [SEQUENCES_A_STEP]]

Only its config.json is read; without a folder, that of OPT-1.3B, below. A simulation, with a band over what nobody has
published about the machine. The same on the command line:

    vspdf simulate step --model FOLDER --batch 512 --sparsity 0.9
"""

import sys
import tempfile
from pathlib import Path

from vspdf.plan.wafer_models import transformer
from vspdf.simulator import machine
from vspdf.simulator.aggregate.estimates import simulate_step
from vspdf.simulator.aggregate.model import Model

OPT = """{"model_type": "opt", "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
          "vocab_size": 50272, "max_position_embeddings": 2048}"""

with tempfile.TemporaryDirectory() as described:
    Path(described, "config.json").write_text(OPT)
    shape, _ = transformer(sys.argv[1] if len(sys.argv) > 1 else described)
batch = int(sys.argv[2]) if len(sys.argv) > 2 else 512
cs2 = machine.load("cs2")
print(
    f"{shape.parameters / 1e6:,.0f}M parameters, {batch} sequences of {shape.sequence_length} tokens a step, one CS-2"
)
for sparsity in (0.75, 0.9):
    found = simulate_step(cs2, Model.uniform(shape, batch, sparsity), sensitivity=False)
    rate, faster, bound = found["tokens_per_second"], found["speedup"], found["bound_by"]
    print(f"at {sparsity:.0%} sparsity: {rate['sparse']['central']:,.0f} tokens a second, dense {rate['dense']:,.0f}")
    print(f"    {faster['central']:.2f}x faster (90 %: {faster['low']:.2f} to {faster['high']:.2f}), bound by {bound}")
    print(f"    if time followed FLOPs: {faster['ideal']:.2f}x")
