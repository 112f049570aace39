"""A small model with random weights, most of whose layers look back only so far."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

WINDOW = 200


def make_model(tokenizer_from: Path, folder: Path) -> Path:
    """A checkpoint folder with the tokenizer of another. What it says depends on all it reads."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    words = json.loads((tokenizer_from / "config.json").read_text())
    config = Gemma3TextConfig(
        vocab_size=words["vocab_size"],
        eos_token_id=words["eos_token_id"],
        bos_token_id=words["bos_token_id"],
        pad_token_id=words["eos_token_id"],
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=8192,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.02)  # or it repeats its last token for ever
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder)
    return folder
