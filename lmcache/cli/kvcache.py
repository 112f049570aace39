"""`lmcache kvcache`: looks into the memory of a server, and clears it."""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import msgspec
import typer

from lmcache.cli.http import Remote, Target, UrlOption
from lmcache.cli.output import Format, FormatOption, print_json, table
from lmcache.core.errors import ConfigError

MOST_TOKEN = (1 << 32) - 1

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


class Cleared(msgspec.Struct):
    """What clearing a tier came to."""

    tier: str
    cleared: int


class Chunk(msgspec.Struct):
    """A chunk that was found."""

    key: str
    pages: int


class Found(msgspec.Struct):
    """Where a prompt's chunks are."""

    engine: str
    tokens: int
    hit_tokens: int
    chunk_tokens: int
    chunks: list[Chunk]
    reason: str
    meaning: str


@app.callback()
def _group() -> None:
    """Look into the memory of a server, or clear it."""


@app.command()
def clear(url: UrlOption = None, output: FormatOption = Format.TERMINAL) -> None:
    """Drop every chunk of the memory that nobody holds."""
    done = Remote(Target.KVCACHE, url).ask("/clear", Cleared, {"tier": "l1"})
    if output is Format.JSON:
        print_json(msgspec.to_builtins(done))
    else:
        print(f"Cleared {done.cleared} chunks")


@app.command()
def lookup(
    tokens: Annotated[str | None, typer.Option(help="Token ids: 1,2,3.")] = None,
    tokens_file: Annotated[Path | None, typer.Option(help="A file of token ids.")] = None,
    engine: Annotated[str, typer.Option(help="Name of the engine, if they differ.")] = "",
    salt: Annotated[str, typer.Option(help="The prompt's cache salt.")] = "",
    lora: Annotated[str, typer.Option(help="The prompt's LoRA adapter.")] = "",
    url: UrlOption = None,
    output: FormatOption = Format.TERMINAL,
) -> None:
    """Show how much of a prompt is in the memory, and why the rest is not."""
    prompt = {"tokens": _tokens(tokens, tokens_file), "engine": engine, "salt": salt, "lora": lora}
    found = Remote(Target.KVCACHE, url).ask("/lookup", Found, prompt)
    if output is Format.JSON:
        print_json(msgspec.to_builtins(found))
        return
    is_whole = found.reason == "none"
    rows = [("Chunks", len(found.chunks)), ("First miss", "none" if is_whole else found.meaning)]
    print(table(("Hit tokens", f"{found.hit_tokens} of {found.tokens}"), rows))


def _tokens(text: str | None, path: Path | None) -> list[int]:
    """The ids given in one of both ways. Raises `ConfigError` for any other word."""
    if (text is None) == (path is None):
        raise ConfigError("say which tokens with either --tokens or --tokens-file")
    option = "--tokens" if path is None else f"--tokens-file {path}"
    if path is not None:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option} cannot be read: {error}") from error
    words = [word for word in re.split(r"[\s,]+", text or "") if word]
    if not words:
        raise ConfigError(f"{option} has no token ids")
    for word in words:
        if not re.fullmatch(r"[0-9]{1,10}", word) or int(word) > MOST_TOKEN:
            raise ConfigError(f"{option} has {word!r}, expected ids between 0 and {MOST_TOKEN}")
    return [int(word) for word in words]
