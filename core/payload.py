"""The numbers in an object's payload, for codecs that may change them."""

from __future__ import annotations

import json
import re

from lmcache.core.objects import HEADER_BYTES, MAGIC, TEXT

_REGIONS = re.compile(r"[0-9]+ x [0-9]+ (?:torch\.)?([a-z0-9_]+) \[")
"""How a line about regions in a layout's summary begins: how many, bytes of a page, dtype."""


def is_object(view: memoryview) -> bool:
    """Whether `view` begins as objects do."""
    return len(view) >= HEADER_BYTES and view[: len(MAGIC)] == MAGIC


def dtype_of(header: memoryview) -> str | None:
    """The dtype of all numbers of an object, by its name in torch, e.g. `bfloat16`.

    None unless the header says it of every region of every slice, and always the same.
    """
    text = bytes(header[TEXT:HEADER_BYTES]).rstrip(b"\0")
    try:
        layouts = json.loads(text)["layouts"]
        lines = [line for layout in layouts for line in layout.split("\n")[1:]]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    found = {match[1] if (match := _REGIONS.match(line)) else None for line in lines}
    return found.pop() if len(found) == 1 else None
