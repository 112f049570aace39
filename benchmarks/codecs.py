"""Ratio, speed and loss of every codec, on the KV of a real model.

    python benchmarks/codecs.py [--text]

The KV is that of SmolLM2-135M over a document of this repository, in objects of 256 tokens: pages
of 16 tokens with keys and values one after the other. Speeds are per second of processor time, so
that whatever else the machine does matters little: threads add up until memory is the limit.
`--text` also compares what the model says greedily after its KV went through fp8.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from model import prepare_model  # noqa: E402

from lmcache.core.keys import ChunkKey  # noqa: E402
from lmcache.core.objects import HEADER_BYTES, Description, layouts_text, seal, start_header  # noqa: E402
from lmcache.plugins.manager import PluginManager  # noqa: E402

TOKENS = 1024
CHUNK = 256
PAGE = 16
ROUNDS = 7
CODECS = ("zlib", "zstd", "lz4", "fp8")
QUESTIONS = 4
ANSWER = 32


def document(tokenizer, first=0, count=TOKENS):
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text, return_tensors="pt", truncation=False).input_ids
    return ids[:, first : first + count]


def objects(model, ids):
    """The model's KV as objects, one for each chunk."""
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
    count, _, heads, tokens, size = kv.shape
    kv = kv.view(count, 2, heads, tokens // CHUNK, CHUNK // PAGE, PAGE, size)
    chunks = kv.permute(3, 0, 4, 1, 2, 5, 6).contiguous().view(tokens // CHUNK, -1)
    return [as_object(chunk) for chunk in chunks]


def as_object(chunk):
    payload = chunk.view(torch.uint8).numpy()
    layout = f"v1 bench {PAGE} region x1\n1 x {payload.size} {chunk.dtype} [] x1 in order []"
    about = Description(
        ChunkKey(bytes(32)),
        ChunkKey(bytes(32)),
        bytes(32),
        1,
        payload.size,
        layouts_text([layout]),
    )
    view = memoryview(bytearray(HEADER_BYTES + payload.size))
    view[HEADER_BYTES:] = payload.data
    start_header(view, about)
    seal(view)
    return view


def best(call, *arguments):
    """The least processor time that it takes to call it with all arguments, and the answers."""
    times, answers = [], []
    for _ in range(ROUNDS):
        begun = time.process_time()
        answers = list(map(call, *arguments))
        times.append(time.process_time() - begun)
    return min(times), answers


def measure(codec, stored):
    """Ratio, GB/s of packing and of unpacking, and the numbers that came back."""
    size = sum(view.nbytes for view in stored)
    outs = [memoryview(bytearray(view.nbytes)) for view in stored]
    packing, packed = best(codec.encode, stored)
    unpacking, _ = best(codec.decode_into, list(map(memoryview, packed)), outs)
    return size / sum(map(len, packed)), size / packing / 1e9, size / unpacking / 1e9, outs


def loss(stored, outs, dtype):
    """Mean and 99.9th percentile of the relative error, and the error's share of the energy."""
    want, got = (
        torch.cat([torch.frombuffer(view[HEADER_BYTES:], dtype=dtype) for view in views]).double()
        for views in (stored, outs)
    )
    error = (got - want).abs()
    relative = (error / want.abs())[want != 0].numpy()
    energy = float((error.pow(2).mean() / want.pow(2).mean()).sqrt())
    return float(relative.mean()), float(np.quantile(relative, 0.999)), energy


def through(codec, tensor):
    """A tensor after it was packed and unpacked."""
    stored = as_object(tensor.contiguous().reshape(-1))
    out = memoryview(bytearray(stored.nbytes))
    codec.decode_into(memoryview(codec.encode(stored)), out)
    return torch.frombuffer(out[HEADER_BYTES:], dtype=tensor.dtype).view(tensor.shape).clone()


def answer(model, ids, cache):
    options = {"max_new_tokens": ANSWER, "do_sample": False, "past_key_values": cache}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]


def compare_text(model, tokenizer, codec):
    """How many tokens of greedy answers are the same with the prompt's KV through `codec`."""
    same = []
    for number in range(QUESTIONS):
        ids = document(tokenizer, number * TOKENS, TOKENS)
        with torch.no_grad():
            cache = model(ids[:, :-1], use_cache=True).past_key_values
        changed = copy.deepcopy(cache)
        for layer in changed.layers:
            layer.keys, layer.values = through(codec, layer.keys), through(codec, layer.values)
        plain, lossy = answer(model, ids, cache), answer(model, ids, changed)
        differs = (plain != lossy).nonzero()
        same.append(int(differs[0]) if len(differs) else len(plain))
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="store_true")
    options = parser.parse_args()
    plugins = PluginManager(entry_points=False)
    path = prepare_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        stored = objects(model, document(tokenizer))
        for name in CODECS:
            codec = plugins.create_codec(name)
            ratio, packing, unpacking, outs = measure(codec, stored)
            print(f"{dtype} {name}: {ratio:.3f}, pack {packing:.2f}, unpack {unpacking:.2f} GB/s")
            if not codec.lossless:
                mean, most, energy = loss(stored, outs, dtype)
                print(f"    off by {mean:.2%} in the mean, {most:.2%} (99.9 %), rms {energy:.2%}")
        if options.text:
            same = compare_text(model, tokenizer, plugins.create_codec("fp8"))
            print(f"{dtype}: of {ANSWER} tokens these many are the same: {same}")


if __name__ == "__main__":
    main()
