"""Half the bytes for KV that an engine keeps in 16 bits: FP8 E4M3, with one scale for all.

    encoded[i] = e4m3(source[i] / scale), where more than 448 becomes 448
    decoded[i] = source[i] * scale

The arithmetic is in integers, because GPUs before 8.9 have no instruction for it. It rounds to the
nearest, ties to even, as torch does. It loses precision, so nothing does it unless asked to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmcache.core.kernels.words import PROGRAMS, WARPS

BLOCK = 2048
FULL = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _encode_kernel(
    source,  # [N] float16, bfloat16 or float32
    target,  # [N] uint8
    count,
    scale,
    BLOCK: tl.constexpr,
):
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < count, other=0).to(tl.float32) / scale
        bits = value.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = tl.minimum(tl.abs(value), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        # 20 of 23 bits go: add just less than half of the last that stays, or half if that is odd
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1) >> 20) - (120 << 3)
        # below 2**-6 the steps are 2**-9; adding 2**23 leaves as many of them in the low bits
        small = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
        code = tl.where(size < 0.015625, small, normal)
        code = tl.where(value == value, code, 0x7F) | sign
        tl.store(target + at, code.to(tl.uint8), mask=at < count)


@triton.jit
def _decode_kernel(
    source,  # [N] uint8
    target,  # [N] float16, bfloat16 or float32
    count,
    scale,
    BLOCK: tl.constexpr,
):
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
        at = first + tl.arange(0, BLOCK)
        code = tl.load(source + at, mask=at < count, other=0).to(tl.int32)
        low = code & 0x7F
        normal = ((low + (120 << 3)) << 20).to(tl.float32, bitcast=True)
        value = tl.where(low < 8, low.to(tl.float32) * 0.001953125, normal)
        value = tl.where(low == 0x7F, float("nan"), value)
        # as bits: before Triton 3.8 a minus subtracts from 0.0, so -0.0 would become 0.0
        bits = value.to(tl.int32, bitcast=True) | (code & 0x80) << 24
        value = bits.to(tl.float32, bitcast=True) * scale
        tl.store(target + at, value.to(target.dtype.element_ty), mask=at < count)


def encode(source: torch.Tensor, target: torch.Tensor, scale: float) -> None:
    """Fill `target` (float8_e4m3fn) from `source` of 16 or 32 bits; done when the stream is.

    Both contiguous, on one device and of one size. Raises `ValueError` otherwise.
    """
    _check(source, target, scale)
    _launch(_encode_kernel, source, target.view(torch.uint8), scale)


def decode(source: torch.Tensor, target: torch.Tensor, scale: float) -> None:
    """Fill `target` of 16 or 32 bits from `source` (float8_e4m3fn), likewise."""
    _check(target, source, scale)
    _launch(_decode_kernel, source.view(torch.uint8), target, scale)


def _check(full: torch.Tensor, half: torch.Tensor, scale: float) -> None:
    if full.dtype not in FULL or half.dtype != torch.float8_e4m3fn:
        raise ValueError(f"no conversion between {full.dtype} and {half.dtype}")
    if full.numel() != half.numel() or full.device != half.device:
        raise ValueError(f"{full.numel()} on {full.device}, {half.numel()} on {half.device}")
    if not (full.is_contiguous() and half.is_contiguous()):
        raise ValueError("not contiguous")
    if not scale > 0:
        raise ValueError(f"scale {scale} is not positive")


def _launch(kernel: object, source: torch.Tensor, target: torch.Tensor, scale: float) -> None:
    count = source.numel()
    if count:
        grid = (min(PROGRAMS, triton.cdiv(count, BLOCK)),)
        kernel[grid](source, target, count, scale, BLOCK=BLOCK, num_warps=WARPS)  # type: ignore[index]
