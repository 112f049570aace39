"""Keeps secrets out of messages, listings and reprs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TELLTALE = r"(?:pass|secret|token|credential|signature|(?:access|account|api|private)_?key)"
_NAME = re.compile(_TELLTALE, re.IGNORECASE)
_QUERY = re.compile(rf"([?&][^=&#\s]*{_TELLTALE}[^=&#\s]*=)[^&#\s'\"]*", re.IGNORECASE)
# a password may hold any character, however wrongly: after a colon, all up to the last @ goes
_USER = r"(?<=://)(?:[^\s/?#:]*:%s*|[^\s/?#]*)@"
_USER_IN_TEXT = re.compile(_USER % r"\S")
_USER_IN_VALUE = re.compile(_USER % r"[\s\S]" + r"|^[^\s/?#:]*:[^\s/]*@")


def redact_text(text: str) -> str:
    """`text` with the user part and the secret options of the URLs in it replaced by `***`."""
    return _QUERY.sub(r"\1***", _USER_IN_TEXT.sub("***@", text))


def redact_value(value: Any) -> Any:
    """A value without secrets, all the way down; in a mapping also what has a secret's name."""
    if isinstance(value, str):
        return redact_text(_USER_IN_VALUE.sub("***@", value))
    if isinstance(value, Mapping):
        return {k: "***" if _NAME.search(str(k)) else redact_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact_value(item) for item in value)
    return value
