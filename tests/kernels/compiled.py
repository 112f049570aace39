"""Compiles every kernel for every GPU we name, and prints as JSON what the machine code is like.

A process of its own, for elsewhere in the tests the kernels are interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmcache.core.kernels import fp8, guard, paged, scattered
from lmcache.core.kernels.words import WARPS, WORDS, tile_bytes

CAPABILITIES = (80, 89, 90, 100)
TABLES = {"pages": "*i64", "regions": "*i64", "offsets": "*i64", "places": "*i64", "runs": "*i64"}
TABLES["guard"] = "i64"
CONVERSIONS = (
    (fp8._encode_kernel, {"source": "*bf16", "target": "*u8", "count": "i64", "scale": "fp32"}),
    (fp8._decode_kernel, {"source": "*u8", "target": "*bf16", "count": "i64", "scale": "fp32"}),
)


def variants():
    for word in WORDS:
        tile = tile_bytes(word)
        yield scattered._runs_kernel, TABLES, {"WORD": word, "PIECE": tile}
        for way in ((True, False), (False, False), (False, True)):
            for rows in (1, 16):
                shape = {"WORD": word, "PIECE": tile // rows, "ROWS": rows}
                constants = dict(zip(("TO_STORED", "GUARDED"), way, strict=True))
                yield paged._paged_kernel, TABLES, {**constants, **shape}
    yield guard.shut_kernel, {"word": "*i32"}, {"BIT": guard.SHUT}
    for kernel, types in CONVERSIONS:
        yield kernel, types, {"BLOCK": fp8.BLOCK}


def compiled(kernel, types, constants, capability):
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS}
    )


def stack_bytes(cubin):
    """What each thread has in local memory, as the assembler's own tool says."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return [int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", said)]


def main():
    warnings.simplefilter("ignore")
    rows = []
    for capability in CAPABILITIES:
        for kernel, types, constants in variants():
            binary = compiled(kernel, types, constants, capability)
            ptx = binary.asm["ptx"]
            rows.append(
                {
                    "kernel": kernel.__name__,
                    "capability": capability,
                    **constants,
                    "accesses": Counter(re.findall(r"\b(?:ld|st)\.global\S*", ptx)),
                    "order": re.findall(r"\b(?:atom|red|bar|st\.global\.cs)\S*", ptx),
                    "has_local": bool(re.search(r"\.local\b", ptx)),
                    "stack": stack_bytes(binary.asm["cubin"]),
                    "cubin_bytes": len(binary.asm["cubin"]),
                }
            )
    json.dump(rows, sys.stdout)


main()
