"""Ask, push what was asked out of a small pool, and ask again: `python real.py PRESET MODEL`."""

import sys

from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi.llm_args import KvCacheConfig, KvCacheConnectorConfig

if __name__ == "__main__":
    preset, model = sys.argv[1:]
    llm = LLM(
        model=model,
        backend="pytorch",
        kv_cache_config=KvCacheConfig(
            enable_block_reuse=True, enable_partial_reuse=False, max_tokens=512
        ),
        kv_connector_config=KvCacheConnectorConfig(connector=preset),
    )
    prompts = ["The harbour was rebuilt in 1907. " * 40, "A mill stood by the river. " * 50]
    for prompt in (*prompts, prompts[0]):
        [answer] = llm.generate([prompt], SamplingParams(max_tokens=20, temperature=0))
        print(repr(answer.outputs[0].text))
