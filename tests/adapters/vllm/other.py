"""Another connector, to stand beside ours in vLLM's `MultiConnector`: it has every prompt whose
first
token is `THEIRS`, up to `HAS` tokens of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fake_codes import Codes, words
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

THEIRS = 999
HAS = 32
PAGE = 4


@dataclass
class Loads(KVConnectorMetadata):
    loads: list[tuple[list[int], int, list[int]]] = field(default_factory=list)
    """Tokens, how many of them vLLM has already, and the page table."""


class OtherConnector(KVConnectorBase_V1):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.promised: dict[str, tuple[list[int], int]] = {}
        self.told: list[tuple[str, int]] = []

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        if request.prompt_token_ids[0] != THEIRS:
            return 0, False
        need = max(0, min(HAS, request.num_tokens - 1) - num_computed_tokens)
        self.promised[request.request_id] = (list(request.all_token_ids), num_computed_tokens)
        return need, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.told.append((request.request_id, num_external_tokens))
        if num_external_tokens == 0:
            self.promised.pop(request.request_id, None)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads = Loads()
        cached = scheduler_output.scheduled_cached_reqs
        rows = [
            (new.req_id, new.num_computed_tokens, new.block_ids)
            for new in scheduler_output.scheduled_new_reqs
        ]
        rows += zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True)
        for request_id, computed, pages in rows:
            if request_id in self.promised:
                tokens, local = self.promised.pop(request_id)
                loads.loads.append((tokens[:computed], local, pages[0]))
        return loads

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.layers = [tensor.view(torch.int64).numpy() for tensor in kv_caches.values()]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for tokens, local, table in self._get_connector_metadata().loads:
            positions = np.arange(local, len(tokens))
            pages = np.array(table)[positions // PAGE]
            codes = Codes().upto(tokens)[local:]
            for number, layer in enumerate(self.layers):
                _, heads, _, per_head = layer.shape
                layer[pages, :, positions % PAGE, :] = words(
                    codes, number, 0, heads, per_head
                ).astype(np.int64)

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None: ...

    def wait_for_save(self) -> None: ...
