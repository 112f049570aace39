"""Real vLLM in a child process, for tests.

The parent's half is `Engine` (one engine, many requests) and `run_vllm` (one function of a test
file). Both run this file as a script and talk JSON lines with it over a socket: `{"id", "op",
"arguments"}` goes in, `{"id", "result"}` or `{"id", "error"}` comes back, in any order. What the
child prints, which includes vLLM's and the connector's lines, goes to a log file.

What an engine costs on two idle cores, with the model of 135 million parameters: every process of
it imports vLLM, 6 s, and torch.compile takes 50 s, so `enforce_eager` is the default. Frontend,
EngineCore and worker are up in 25 s. With `one_process=True` EngineCore and worker share a process,
as they do on one GPU; that is up in 15 s, and computes on both cores instead of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

VLLM_PATH = "LMCACHE_TEST_VLLM_PATH"
"""Names a folder made by `pip install --target`, whose vLLM replaces the installed one."""

ENGINE_DEFAULTS = {
    "max_model_len": 4096,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",  # for `autopsy`
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_COLOR": "0",
}
LONGEST_LINE = 1 << 28
LOG_TAIL = 40
STACKS = 400
"""Lines of a log that ends with the stacks of every thread."""

LINE = (
    "The keeper of lighthouse number {} wrote down the wind, the tide and every ship that passed. "
)

Prompt = str | Sequence[int] | dict[str, Any]


class ChildError(RuntimeError):
    """The child failed, died or was too slow; the message ends with its traceback or its log."""


@dataclass(frozen=True)
class Completion:
    """What became of one request."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str | None
    """vLLM's `stop`, `length`, `abort` or `error`; `abort` also if the engine never answered."""
    num_cached_tokens: int | None
    """Prompt tokens that were not computed, from vLLM's own cache and from a connector alike."""
    ttft_s: float | None
    """From the request's submission to its first token, as a streaming client sees it."""
    kv_transfer_params: dict[str, Any] | None


def story(number: int, tokens: int) -> str:
    """Distinct text of about `tokens` tokens; the same for the same arguments."""
    rng = random.Random(number)
    lines = [f"Log {number}. "]
    while sum(map(len, lines)) < tokens * 4:
        lines.append(LINE.format(rng.randrange(1000)))
    return "".join(lines) + "In short, the keeper was"


# --- the parent's half ----------------------------------------------------------------------------


class Child:
    """This file, running as a script. Calls may come from any thread and overlap."""

    def __init__(self, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=child_environment(env or {}),
                start_new_session=True,
            )
        self._socket = ours
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._gone = False
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="vllm-child", daemon=True)
        self._reader.start()

    def submit(self, op: str, **arguments: Any) -> Future[Any]:
        """Start `op` in the child."""
        future: Future[Any] = Future()
        with self._lock:
            if self._gone:
                raise ChildError(self._obituary())
            number = next(self._ids)
            self._waiting[number] = future
            line = json.dumps({"id": number, "op": op, "arguments": arguments})
            with contextlib.suppress(BrokenPipeError):  # the reader will notice, and say more
                self._socket.sendall(line.encode() + b"\n")
        return future

    def call(self, op: str, *, timeout: float, **arguments: Any) -> Any:
        """The result of `op`; a child that is too slow is killed."""
        return self.wait(self.submit(op, **arguments), timeout, op)

    def wait(self, future: Future[Any], timeout: float, what: str = "an answer") -> Any:
        try:
            return future.result(timeout)
        except FutureTimeoutError as error:
            self.kill()
            raise ChildError(f"no {what} after {timeout} s\n{self._tail()}") from error

    def close(self, timeout: float = 30) -> None:
        """Shut the engine down, then end the child and whatever it left behind."""
        with contextlib.suppress(ChildError, FutureTimeoutError):
            self.submit("stop").result(timeout)
        # Python's resource tracker goes last: it unlinks the shared memory of processes vLLM killed
        deadline = time.monotonic() + timeout
        while self._lives() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """End the child's whole process group at once."""
        if not self._ended and self._lives():
            os.killpg(self._process.pid, signal.SIGKILL)
        # the group's number may be another's from now on
        self._ended = True
        self._process.wait()
        self._reader.join()
        self._socket.close()

    def autopsy(self) -> str:
        """End a child that hangs and say where each of its threads was."""
        if not self._ended and self._lives():
            os.killpg(self._process.pid, signal.SIGABRT)
            deadline = time.monotonic() + 5
            while self._lives() and time.monotonic() < deadline:
                time.sleep(0.05)
        self.kill()
        return self._tail(STACKS)

    def _lives(self) -> bool:
        """Whether any process of the child's group is left."""
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _read(self) -> None:
        with contextlib.suppress(ConnectionResetError), self._socket.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                with self._lock:
                    future = self._waiting.pop(answer["id"])
                if "error" in answer:
                    future.set_exception(ChildError(answer["error"]))
                else:
                    future.set_result(answer["result"])
        with self._lock:
            self._gone = True
            orphans = list(self._waiting.values())
            self._waiting.clear()
        for future in orphans:
            future.set_exception(ChildError(self._obituary()))

    def _obituary(self) -> str:
        return f"the child with vLLM has ended\n{self._tail()}"

    def _tail(self, length: int = LOG_TAIL) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"{self.log} ends with:", *lines[-length:]])


class Engine:
    """A vLLM engine in a child process, made from vLLM's own engine arguments.

    with Engine({"model": ...}, log=..., env={"LMCACHE_CHUNK_SIZE": "128"}) as engine:
        [completion] = engine.generate(["The capital of France is"], max_tokens=4)
    """

    def __init__(
        self,
        engine_args: Mapping[str, Any],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        one_process: bool = False,
        timeout: float = 300,
    ) -> None:
        multiprocessing = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if one_process else "1"}
        self.log = log
        self._child = Child(log, multiprocessing | dict(env or {}))
        self._names = itertools.count()
        start = time.perf_counter()
        try:
            self._child.call(
                "start", engine_args=ENGINE_DEFAULTS | dict(engine_args), timeout=timeout
            )
        except BaseException:
            self._child.kill()
            raise
        self.startup_s = time.perf_counter() - start

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompts: Sequence[Prompt],
        *,
        request_ids: Sequence[str] | None = None,
        max_tokens: int = 16,
        **sampling: Any,
    ) -> Future[list[dict[str, Any]]]:
        """Start requests together; `complete` waits for them."""
        names = request_ids or [f"request-{next(self._names)}" for _ in prompts]
        params = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
        requests = list(zip(names, prompts, strict=True))
        return self._child.submit("generate", requests=requests, sampling=params)

    def complete(
        self, future: Future[list[dict[str, Any]]], timeout: float = 120
    ) -> list[Completion]:
        """The completions of submitted requests, in their order."""
        return [Completion(**fields) for fields in self._child.wait(future, timeout)]

    def generate(
        self, prompts: Sequence[Prompt], *, timeout: float = 120, **options: Any
    ) -> list[Completion]:
        """Greedy completions of prompts that run together; `options` are those of `submit`."""
        return self.complete(self.submit(prompts, **options), timeout)

    def abort(self, *request_ids: str) -> None:
        """Cancel running requests as a client does that hangs up; unknown ids are ignored."""
        self._child.call("abort", request_ids=request_ids, timeout=30)

    def stats(self) -> dict[str, Any]:
        """vLLM's `version`, `block_size`, `num_blocks` and its number of `unfinished` requests."""
        stats: dict[str, Any] = self._child.call("stats", timeout=30)
        return stats

    def autopsy(self) -> str:
        """End an engine that hangs and say where each of its threads was."""
        return self._child.autopsy()

    def reset_prefix_cache(self) -> None:
        """Empty vLLM's own prefix cache; a connector's is left alone."""
        self._child.call("reset_prefix_cache", timeout=30)

    def close(self) -> None:
        self._child.close()


def run_vllm(
    function: Callable[..., dict[str, Any]],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    **arguments: Any,
) -> dict[str, Any]:
    """Call a function of a module's top level in a fresh process, for what `Engine` cannot do.

    Arguments and result pass through JSON. The function's module is imported from its file.
    """
    child = Child(log, env)
    try:
        result: dict[str, Any] = child.call(
            "scenario",
            file=function.__code__.co_filename,
            name=function.__name__,
            arguments=arguments,
            timeout=timeout,
        )
        return result
    finally:
        child.close()


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment less what would configure LMCache, with `extra` on top."""
    ours = {name: text for name, text in os.environ.items() if not name.startswith("LMCACHE_")}
    env = ENVIRONMENT | ours | dict(extra)
    if folder := os.environ.get(VLLM_PATH):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, env.get("PYTHONPATH")]))
    return env


def import_file(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# --- the child's half -----------------------------------------------------------------------------


class Host:
    """Answers the parent's calls, one method each."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.running: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def start(self, engine_args: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if transfer := engine_args.get("kv_transfer_config"):
            from vllm.config import KVTransferConfig

            engine_args["kv_transfer_config"] = KVTransferConfig(**transfer)
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))

    async def generate(
        self, requests: list[tuple[str, Any]], sampling: dict[str, Any]
    ) -> list[dict[str, Any]]:
        for request_id, prompt in requests:
            self.running[request_id] = asyncio.create_task(
                self.complete(request_id, prompt, sampling)
            )
        try:
            return await asyncio.gather(*(self.running[request_id] for request_id, _ in requests))
        finally:
            for request_id, _ in requests:
                self.running.pop(request_id, None)

    async def complete(
        self, request_id: str, prompt: Any, sampling: dict[str, Any]
    ) -> dict[str, Any]:
        from vllm import SamplingParams

        if isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt}
        params = SamplingParams(**sampling)
        output = ttft_s = None
        begin = time.perf_counter()
        # cancelled: the client hung up, and what it has by then is its answer
        with contextlib.suppress(asyncio.CancelledError):
            async for latest in self.engine.generate(prompt, params, request_id):
                output = latest
                ttft_s = ttft_s or time.perf_counter() - begin
        choice = output.outputs[0] if output else None
        return {
            "request_id": request_id,
            "text": choice.text if choice else "",
            "token_ids": list(choice.token_ids) if choice else [],
            "finish_reason": (choice and choice.finish_reason) or "abort",
            "num_cached_tokens": output and output.num_cached_tokens,
            "ttft_s": ttft_s,
            "kv_transfer_params": output and output.kv_transfer_params,
        }

    async def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if task := self.running.get(request_id):
                task.cancel()

    async def stats(self) -> dict[str, Any]:
        import vllm

        cache_config = self.engine.vllm_config.cache_config
        return {
            "version": vllm.__version__,
            "block_size": cache_config.block_size,
            "num_blocks": cache_config.num_gpu_blocks,
            "unfinished": self.engine.output_processor.get_num_unfinished_requests(),
        }

    async def reset_prefix_cache(self) -> None:
        await self.engine.reset_prefix_cache()

    async def scenario(self, file: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        function = getattr(import_file(Path(file)), name)
        # in a thread, because vLLM's offline API may not run inside an event loop
        result: dict[str, Any] = await asyncio.to_thread(function, **arguments)
        return result

    async def stop(self) -> None:
        if self.engine:
            self.engine.shutdown()
            self.engine = None


async def serve(descriptor: int) -> None:
    """Answer calls until told to stop, or until the parent is gone."""
    host = Host()
    reader, writer = await asyncio.open_connection(
        sock=socket.socket(fileno=descriptor), limit=LONGEST_LINE
    )
    stopped = asyncio.Event()

    async def answer(number: int, op: str, arguments: dict[str, Any]) -> None:
        try:
            reply = {"result": await getattr(host, op)(**arguments)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        writer.write(json.dumps({"id": number, **reply}).encode() + b"\n")
        await writer.drain()
        if op == "stop":
            stopped.set()

    async def listen() -> None:
        calls = set()
        while line := await reader.readline():
            message = json.loads(line)
            call = asyncio.create_task(answer(message["id"], message["op"], message["arguments"]))
            calls.add(call)
            call.add_done_callback(calls.discard)
        stopped.set()

    listener = asyncio.create_task(listen())
    await stopped.wait()
    listener.cancel()
    await host.stop()


if __name__ == "__main__":
    # a test file may import what tests of other things share
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    asyncio.run(serve(int(sys.argv[1])))
    # all is shut down, and tearing torch down would take seconds
    sys.stdout.flush()
    os._exit(0)
