"""TensorRT-LLM's front door: text in, text out, and an executor in between."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from driver import Engine


class SamplingParams:
    def __init__(self, max_tokens=32, **others):
        self.max_tokens = max_tokens


class Chosen:
    """A connector as a script chose it."""

    ours = ()
    saves_later = True

    def __init__(self, config):
        self._config = config

    def config(self, profile):
        return self._config

    def settle(self):
        pass

    def close(self):
        pass

    def attend(self, engine):
        pass


def llm_class(profile):
    """The class of one version."""

    class LLM:
        def __init__(self, model, kv_connector_config, kv_cache_config=None, **others):
            api = sys.modules["tensorrt_llm.llmapi.llm_args"]
            cache = kv_cache_config or api.KvCacheConfig()
            self.engine = Engine(
                profile,
                Chosen(kv_connector_config),
                args={"model": model, "kv_cache_config": cache, **others},
                bs=cache.tokens_per_block,
            )

        def generate(self, prompts, sampling_params):
            """One token for each letter."""
            asked = [
                self.engine.submit(map(ord, text), new_tokens=sampling_params.max_tokens)
                for text in prompts
            ]
            self.engine.run()
            return [self._answer(request) for request in asked]

        @staticmethod
        def _answer(request):
            said = request.tokens[len(request.prompt) :]
            text = "".join(chr(97 + token % 26) for token in said)
            return SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=said)])

        def shutdown(self):
            self.engine.__exit__(None, None, None)

    return LLM
