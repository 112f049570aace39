"""How SGLang is told to run on a CPU: its command line and its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOME = ROOT / ".sglang"
"""Where `scripts/setup.sh` installs it: each version in a folder of its own, and what they need."""
PYTHON = HOME / "venv/bin/python"

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # a request for one token, and a second's wait for it, each time that somebody asks for /health
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    "TORCHDYNAMO_DISABLE": "1",  # or the first request compiles for 24 s
    "TRITON_INTERPRET": "1",  # versions before 0.5.21 allocate pages by a kernel
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONFAULTHANDLER": "1",
}
# single precision: an answer does not depend on what is computed beside it
ALWAYS = """
    --host 127.0.0.1 --device cpu --attention-backend torch_native --sampling-backend pytorch
    --grammar-backend none --disable-cuda-graph --dtype float32 --mem-fraction-static 0.3
    --max-running-requests 8
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a test says about a server."""

    version: str
    model: Path
    pool_tokens: int = 4096
    page: int = 1
    tp: int = 1
    overlap: bool = False
    """Whether a batch is scheduled while the one before it is computed, as is SGLang's default."""
    chunked: int | None = None
    """Tokens of a prompt that are computed at once."""
    in_process: bool = False
    """For 0.5.20: the cache in the scheduler's process instead of the server's."""
    lmcache: bool = True
    config_file: Path | None = None
    """Of LMCache; only versions after 0.5.12 know the option."""
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, port: int) -> list[str]:
        options = {
            "--port": port,
            "--model-path": self.model,
            "--max-total-tokens": self.pool_tokens,
            "--page-size": self.page,
            "--tp": self.tp,
            "--chunked-prefill-size": self.chunked or -1,
        }
        if self.config_file:
            options["--lmcache-config-file"] = self.config_file
        words = [str(word) for option in options.items() for word in option]
        words += [] if self.overlap else ["--disable-overlap-schedule"]
        words += ["--enable-lmcache"] if self.lmcache else []
        return [str(PYTHON), "-m", "sglang.launch_server", *ALWAYS.split(), *words]

    def environment(self, temporary: Path) -> dict[str, str]:
        """The environment less what would configure LMCache, with `env` on top."""
        ours = {name: text for name, text in os.environ.items() if not name.startswith("LMCACHE_")}
        env = ours | ENVIRONMENT | {"TMPDIR": str(temporary)}
        if self.tp > 1:
            # or SGLang wants a NUMA node for each rank
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(self.tp)))
        if self.in_process:
            env["SGL_FORCE_IP"] = "1"
        env |= self.env
        folders = [env.get("PYTHONPATH"), ROOT, HOME / self.version, HERE / "stubs"]
        return env | {"PYTHONPATH": os.pathsep.join(str(folder) for folder in folders if folder)}
