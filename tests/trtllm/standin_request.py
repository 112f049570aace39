"""A request as a connector sees it: the C++ object, and the Python object around it."""

from __future__ import annotations

from enum import Enum

NATIVE = {
    "request_id",
    "get_tokens",
    "prompt_len",
    "lora_task_id",
    "multimodal_hashes",
    "multimodal_positions",
    "multimodal_lengths",
    "is_dummy_request",
    "kv_cache_retention_config",
}
PYTHON = {"py_request_id", "py_max_new_tokens", "is_finished", "state"}


class LlmRequestState(Enum):
    CONTEXT_INIT = 10
    GENERATION_IN_PROGRESS = 13
    GENERATION_COMPLETE = 20
    DISAGG_GENERATION_TRANS_IN_PROGRESS = 9
    DISAGG_CONTEXT_TRANS_IN_PROGRESS = 21
    DISAGG_CONTEXT_COMPLETE = 22


class RetentionConfig:
    """Something a request may carry; blocks of such a request have priorities."""

    def __init__(self, priority):
        self.priority = priority


class NativeRequest:
    """Nothing but what is bound natively; whatever else is asked for is refused."""

    __slots__ = ("_of", "_salt")
    _NAMES = NATIVE

    def __init__(self, of, salt):
        object.__setattr__(self, "_of", of)
        object.__setattr__(self, "_salt", salt)

    def __getattr__(self, name):
        if name in self._NAMES or (self._salt and name == self._salt):
            return getattr(self, f"_{name}")()
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name, value):
        raise AttributeError(f"a connector sets nothing on a request, and so not {name!r}")

    def _request_id(self):
        return self._of.id

    def _get_tokens(self):
        return self._tokens_of_beam

    def _tokens_of_beam(self, beam):
        if beam != 0:
            raise IndexError("there is one beam")
        return list(self._of.tokens)

    def _prompt_len(self):
        return len(self._of.prompt)

    def _cache_salt(self):
        return self._of.salt

    def _cache_salt_id(self):
        return self._of.salt

    def _lora_task_id(self):
        return self._of.lora

    def _multimodal_hashes(self):
        return [list(hashed) for _, _, hashed in self._of.media] or None

    def _multimodal_positions(self):
        return [start for start, _, _ in self._of.media] or None

    def _multimodal_lengths(self):
        return [length for _, length, _ in self._of.media] or None

    def _is_dummy_request(self):
        return False

    def _kv_cache_retention_config(self):
        return None if self._of.priority is None else RetentionConfig(self._of.priority)


class PythonRequest(NativeRequest):
    """What `update_state_after_alloc` and `request_finished` are given."""

    __slots__ = ()
    _NAMES = NATIVE | PYTHON

    def _py_request_id(self):
        return self._of.id

    def _py_max_new_tokens(self):
        return self._of.new_tokens

    def _is_finished(self):
        return self._of.is_finished

    def _state(self):
        return self._of.state
