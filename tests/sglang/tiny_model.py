"""Writes the smallest model that SGLang serves: `python tiny_model.py FOLDER`.

Run with SGLang's own Python. Its weights are random, and large enough for every key and value to
change what it answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 4, 256, 512, 4, 2
VOCABULARY = 512
START, END = 256, 257
SPREAD = 0.1

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16384,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": START,
    "eos_token_id": END,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    inner = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    keys = HIDDEN // HEADS * KV_HEADS
    attention = {"q": HIDDEN, "k": keys, "v": keys, "o": HIDDEN}
    made = {"lm_head": (VOCABULARY, HIDDEN), "model.embed_tokens": (VOCABULARY, HIDDEN)}
    norms = ["model.norm"]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        made |= {f"{name}.mlp.{part}_proj": shape for part, shape in inner.items()}
        made |= {f"{name}.self_attn.{p}_proj": (rows, HIDDEN) for p, rows in attention.items()}
        norms += [f"{name}.input_layernorm", f"{name}.post_attention_layernorm"]
    tensors = {f"{name}.weight": torch.randn(shape) * SPREAD for name, shape in made.items()}
    return tensors | {f"{name}.weight": torch.ones(HIDDEN) for name in norms}


def tokenizer() -> Tokenizer:
    """One token per byte."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": START, "</s>": END}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def write(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    tokenizer().save(str(folder / "tokenizer.json"))
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
