"""What the values of configuration keys may be.

The same text means the same in the file, in the environment and in the engine's options, so every
type here takes text as well as the value itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Expected:
    """What a value must be, for messages and for the documentation."""

    text: str


def _refuse_flag(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("flag", "a flag is not a number")
    return value


def _none_if_empty(value: object) -> object:
    return None if isinstance(value, str) and value.lower() in ("", "none", "null") else value


def _split_urls(value: object) -> object:
    # a URL may hold commas of its own, so one ends only where the next scheme begins
    if isinstance(value, str):
        return tuple(filter(None, re.split(r"[\s,]+(?=[a-zA-Z][\w+.-]*://)", value.strip(" ,"))))
    return () if value is None else value


def _check_url(value: str) -> str:
    if not re.match(r"[a-zA-Z][\w+.-]*://", value):
        raise PydanticCustomError("url", "not a URL")
    return value


def split_directory(value: str) -> tuple[str, str]:
    """The path and the options of a directory, given as a path or a `file://` URL."""
    if not value.startswith("file://"):
        return value, ""
    path, _, options = value.removeprefix("file://").partition("?")
    return unquote(path), options


def _check_directory(value: str) -> str:
    path, options = split_directory(value)
    if not path or "," in path or "://" in path or "max_size=" in options:
        raise PydanticCustomError("directory", "not one directory")
    return value


_NUMBER = BeforeValidator(_refuse_flag)
_OPTIONAL = BeforeValidator(_none_if_empty)

Flag = Annotated[bool, Expected("true or false")]
Text = Annotated[str, Expected("text")]
Name = Annotated[str, Field(min_length=1), Expected("a name")]
OptionalText = Annotated[str | None, _OPTIONAL, Expected("text, or none")]
Natural = Annotated[int, _NUMBER, Field(ge=0), Expected("a whole number, 0 or more")]
Positive = Annotated[int, _NUMBER, Field(gt=0), Expected("a whole number above 0")]
OptionalNumber = Annotated[int | None, _OPTIONAL, _NUMBER, Expected("a whole number, or none")]
Port = Annotated[int, _NUMBER, Field(ge=0, le=65535), Expected("a port, or 0")]
Amount = Annotated[float, _NUMBER, Field(ge=0), Expected("a number, 0 or more")]
PositiveAmount = Annotated[float, _NUMBER, Field(gt=0), Expected("a number above 0")]
Url = Annotated[str, AfterValidator(_check_url)]
OptionalUrl = Annotated[Url | None, _OPTIONAL, Expected("a URL like redis://host:6379, or none")]
Urls = Annotated[tuple[Url, ...], BeforeValidator(_split_urls), Expected("a list of URLs")]
Directory = Annotated[
    Annotated[str, AfterValidator(_check_directory)] | None,
    _OPTIONAL,
    Expected("one directory, as a path or a file:// URL without max_size, or none"),
]
