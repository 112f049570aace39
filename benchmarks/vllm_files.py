"""vLLM's own offloading on a CPU, where vLLM itself refuses to start it. All is vLLM's but the copy
between pages and its memory, for which it has kernels of CUDA only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


class Copier(OffloadingWorker):  # type: ignore[misc]
    """Copies at once: there is no device that could do it behind the engine."""

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion) -> None:
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = [
            (cache.tensor, region.create_next_worker_view(cache.page_size_bytes))
            for cache in kv_caches.tensors
        ]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for page, place in zip(src_spec.block_ids, dst_spec.block_ids, strict=True):
            for pages, places in self._layers:
                places[place].copy_(pages[page])
        return self._finish(job_id)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for place, page in zip(src_spec.block_ids, dst_spec.block_ids, strict=True):
            for pages, places in self._layers:
                pages[page].copy_(places[place])
        return self._finish(job_id)

    def _finish(self, job_id: int) -> bool:
        self._finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: Iterable[int]) -> None:
        pass


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """Found by vLLM through `spec_name` and `spec_module_path`."""

    def get_worker(self, kv_caches: Any) -> Copier:
        assert self.blocks_per_chunk == 1, "the copier takes pages one by one"
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return Copier(kv_caches, region)
