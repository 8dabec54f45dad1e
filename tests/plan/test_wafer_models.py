"""Models that are simulated alone: their sizes from Hugging Face folders."""

import json

import pytest

from vspdf.errors import UserError
from vspdf.plan.wafer_models import transformer

# Sizes as published; a key that is not there is as in transformers.
GEMMA_2B = {
    "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "head_dim": 256,
    "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 256_000, "max_position_embeddings": 8192,
}  # fmt: skip
STARCODER2_3B = {
    "model_type": "starcoder2", "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
    "num_attention_heads": 24, "num_key_value_heads": 2, "vocab_size": 49_152, "max_position_embeddings": 16384,
}  # fmt: skip
PHI3_MINI = {
    "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_064, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    "body, billions",
    [
        (GEMMA_2B, 2.506), (STARCODER2_3B, 3.03), (PHI3_MINI, 3.821),
        ({**GEMMA_2B, "tie_word_embeddings": False}, 3.030), ({**PHI3_MINI, "tie_word_embeddings": True}, 3.723),
    ],
)  # fmt: skip
def test_the_vocabulary_is_counted_once_or_twice_as_the_model_has_it(tmp_path, body, billions):
    (tmp_path / "config.json").write_text(json.dumps(body))
    assert transformer(str(tmp_path))[0].parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    (tmp_path / "config.json").write_text(json.dumps({**body, "tie_word_embeddings": "yes"}))
    with pytest.raises(UserError, match="expected true or false as tie_word_embeddings, not 'yes'"):
        transformer(str(tmp_path))
