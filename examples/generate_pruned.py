"""A model that another tool has pruned generates faster on a CPU: its zeros become the mask of sparse layers.

    python examples/generate_pruned.py [FOLDER [TOKENS]]

FOLDER is a Hugging Face folder with zeros in its matrices, as SparseGPT, Wanda or `torch.nn.utils.prune` leave them.
Without one a small Llama with random weights is pruned by magnitude here, so that this runs offline in seconds.
"""

import sys
import tempfile
import time

import torch
import transformers

import vspdf

transformers.logging.set_verbosity_error()
tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 32


def pruned():
    """Writes a folder as another tool would: seven of ten weights of every projection and MLP matrix are zeros."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256,
    ))  # fmt: skip
    for name, weight in model.named_parameters():
        if "proj" in name:
            least = weight.detach().abs().flatten().kthvalue(int(0.7 * weight.numel())).values
            weight.data[weight.abs() <= least] = 0
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return folder


def timed(model):
    prompt = torch.tensor([[1, 2, 3, 4]])
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)  # packs masks, chooses paths
    start = time.perf_counter()
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    return ids, tokens / (time.perf_counter() - start)


folder = sys.argv[1] if len(sys.argv) > 1 else pruned()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
expected, dense = timed(model)
patterns = vspdf.sparsify(model, 0.5, init_method="from_zeros")  # whatever the number says: the zeros are the mask
found, sparse = timed(model)

kept, of = sum(p.nnz for p in patterns.values()), sum(p.numel for p in patterns.values())
print(f"{len(patterns)} sparse layers keep {kept / of:.0%} of {of:,} weights")
print(f"the same {tokens} tokens: {torch.equal(expected, found)}")
print(f"{dense:.1f} tokens a second dense, {sparse:.1f} sparse: {sparse / dense:.2f} times as many")
