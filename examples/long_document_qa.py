"""Ask questions about long documents, then ask them again: what a KV cache outside the engine saves.

    python examples/long_document_qa.py [--documents 6] [--tokens 2048] [--model PATH] [--output DIR]

Each leg is a fresh vLLM in a process of its own, and answers one question at a time, so nothing waits for a batch:

* `lmcache`: vLLM with the LMCache connector and without its own prefix cache. First every document once (cold),
  then all of them again in another order (warm).
* `prefix-cache`: the same questions to vLLM's own prefix cache, without LMCache, for comparison.

TTFT is the time from handing a request to vLLM until its first token is back, measured around the stream that
`vllm serve` reads from too. A document nobody asks about is asked first, twice, so compilation and first touches
of memory are not counted. Hit tokens are those that vLLM says it did not compute; bytes are their KV in the model's
geometry. The exit status is 1 if an answer changed or a document was not reused.

Without a GPU this takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

GIB = 1 << 30
MIB = 1 << 20
LMCACHE = "lmcache"
PREFIX_CACHE = "prefix-cache"
LABELS = {LMCACHE: "LMCache hit", PREFIX_CACHE: "vLLM prefix hit"}
ROOM = 256
"""Tokens for the question and the answer, after the document."""


# --- documents ---------------------------------------------------------------------------------------------------

BEGINNINGS = (
    "Ash Birk Cold Dun Elm Fair Glen Hazel Iron Karl Lang Marsh North Oak Quarry Raven".split()
)
ENDINGS = "ford mere sund wick holm stead bury dale haven field".split()
GIVEN = (
    "Marta Johan Ilse Peter Agnes Tomas Clara Henrik Vera Oscar Hanna Julian Edith Simon".split()
)
FAMILY = "Lindqvist Barlow Castellan Dreyer Holloway Ferrand Okafor Petrov Marsden Tanaka".split()
WHO = (
    "the surveyor", "a retired captain", "the school", "the parish council", "an old ferryman",
    "the railway company", "the clerk of works", "a travelling botanist", "the miller",
    "the harbour commission", "a young engineer", "the printer's widow",
)  # fmt: skip
DID = (
    "repaired", "measured", "argued about", "sold", "photographed", "rebuilt", "mapped", "painted",
    "described", "inspected", "paid for", "abandoned",
)  # fmt: skip
WHAT = (
    "the stone bridge", "the eastern sea wall", "a flock of wintering geese", "the town archive",
    "the clock above the market", "two fishing boats", "the road to the quarry", "a collection of maps",
    "the orchard behind the mill", "the telegraph line", "the granary", "the northern lighthouse",
)  # fmt: skip
WHY = (
    "because the spring flood had come early", "before the first frost", "at considerable expense",
    "although nobody had asked for it", "with help from the neighbouring villages",
    "while the minister was away", "after a long and bitter debate", "to the surprise of the newspapers",
    "as the old charter required", "without waiting for permission",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A text, cut to a number of tokens, and a question about its beginning."""

    title: str
    prompt: list[int]
    keeper: str
    """The right answer."""


def write_documents(count: int, tokens: int, tokenizer: Any, seed: int = 0) -> list[Document]:
    """Distinct documents of exactly `tokens` tokens each, the same in every run."""
    names = [first + second for second, first in itertools.product(ENDINGS, BEGINNINGS)]
    if count > len(names):
        raise SystemExit(f"there are names for {len(names)} documents only")
    return [write_document(name, tokens, tokenizer, seed) for name in names[:count]]


def write_document(town: str, tokens: int, tokenizer: Any, seed: int) -> Document:
    rng = random.Random(f"{town} {seed}")
    keeper = f"{rng.choice(GIVEN)} {rng.choice(FAMILY)}"
    text = f"{town}, a chronicle. The keeper of the archive of {town} is {keeper}. "
    ids: list[int] = []
    while len(ids) < tokens:
        text += "".join(itertools.islice(sentences(town, rng), 50))
        ids = tokenizer.encode(text, add_special_tokens=False)
    question = (
        f"\n\nQuestion: Who is the keeper of the archive of {town}?"
        f"\nAnswer: The keeper of the archive of {town} is"
    )
    tail = tokenizer.encode(question, add_special_tokens=False)
    return Document(town, ids[:tokens] + tail, keeper)


def sentences(town: str, rng: random.Random) -> Iterator[str]:
    while True:
        year = rng.randrange(1780, 1930)
        deed = f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)}"
        yield rng.choice(
            [
                f"In {year} {deed} {rng.choice(WHY)}. ",
                f"The chronicle of {town} says that {deed} {rng.choice(WHY)}. ",
                f"Some years later, in {year}, {deed}, and {rng.choice(WHO)} kept a record of it. ",
            ]
        )


# --- one leg, in a process of its own ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a leg is to do."""

    leg: str
    model: str
    prompts: list[list[int]]
    """The first one is the warm-up."""
    warm_order: list[int]
    answer_tokens: int
    kv_bytes: int
    """KV of all prompts and answers, which each cache must be able to hold."""
    engine_args: dict[str, Any] = field(default_factory=dict)


def run_leg(job: Job, log: Path, results: Connection) -> None:
    """The child's main function: everything it prints goes to `log`, what it measures to `results`."""
    with log.open("w") as sink:
        os.dup2(sink.fileno(), sys.stdout.fileno())
        os.dup2(sink.fileno(), sys.stderr.fileno())
    gib = job.kv_bytes / GIB
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(gib)),
        "LMCACHE_LOCAL_CPU": "True",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": str(round(gib + 0.5, 1)),
    }
    for name, text in defaults.items():
        os.environ.setdefault(name, text)
    asyncio.run(measure(job, results))


async def measure(job: Job, results: Connection) -> None:
    from vllm import SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    connector = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=job.model,
            kv_transfer_config=connector if job.leg == LMCACHE else None,
            enable_prefix_caching=job.leg == PREFIX_CACHE,
            **job.engine_args,
        )
    )
    params = SamplingParams(temperature=0.0, max_tokens=job.answer_tokens)

    async def ask(phase: str, number: int) -> None:
        prompt = {"prompt_token_ids": job.prompts[number]}
        first_token = output = None
        start = time.perf_counter()
        async for output in engine.generate(prompt, params, f"{phase}-{number}"):
            first_token = first_token or time.perf_counter()
        answer = Answer(
            phase=phase,
            document=number,
            ttft_s=first_token - start,
            total_s=time.perf_counter() - start,
            hit_tokens=output.num_cached_tokens or 0,
            text=output.outputs[0].text,
        )
        results.send(asdict(answer))

    try:
        for phase in "warm-up", "warm-up again":
            await ask(phase, 0)
        for number in range(1, len(job.prompts)):
            await ask("cold", number)
        for number in job.warm_order:
            await ask("warm", number)
    finally:
        engine.shutdown()


@dataclass(frozen=True)
class Answer:
    """What one request took and gave."""

    phase: str
    document: int
    ttft_s: float
    total_s: float
    hit_tokens: int
    text: str


# --- the parent --------------------------------------------------------------------------------------------------


def watch_leg(job: Job, log: Path) -> list[Answer]:
    """Run a leg to its end and say what happens meanwhile."""
    print(f"\n{job.leg}: starting vLLM, log in {log}", flush=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_leg, args=(job, log, sender))
    process.start()
    # the child's end must be closed here, or its death would not be an end of file
    sender.close()
    answers = []
    count = len(job.prompts) - 1
    try:
        while True:
            answer = Answer(**receiver.recv())
            if answer.phase in ("cold", "warm"):
                answers.append(answer)
            done = (len(answers) - 1) % count + 1 if answers else 0
            print(
                f"  {answer.phase:<13} {f'{done}/{count}' if done else '':<6} "
                f"document {answer.document:<3} TTFT {answer.ttft_s:7.3f} s  "
                f"hit {answer.hit_tokens:>6} tokens  {answer.text.splitlines()[0]!r}",
                flush=True,
            )
    except EOFError:
        process.join()
    if len(answers) < 2 * count:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"{tail}\n\nthe {job.leg} leg ended early; {log} has the whole story")
    return answers


@dataclass(frozen=True)
class Row:
    """One document in one leg."""

    document: str
    cold_s: float
    warm_s: float
    hit_tokens: int
    hit_bytes: int
    same_text: bool


def make_rows(documents: list[Document], answers: list[Answer], token_bytes: int) -> list[Row]:
    cold, warm = (
        {answer.document: answer for answer in answers if answer.phase == phase}
        for phase in ("cold", "warm")
    )
    return [
        Row(
            document=document.title,
            cold_s=cold[number].ttft_s,
            warm_s=warm[number].ttft_s,
            hit_tokens=warm[number].hit_tokens,
            hit_bytes=warm[number].hit_tokens * token_bytes,
            same_text=warm[number].text == cold[number].text,
        )
        for number, document in enumerate(documents, start=1)
    ]


def print_table(legs: dict[str, list[Row]]) -> None:
    """One line a document; hits and texts are those of the first leg."""
    warm = "".join(f"{LABELS[leg]:>17}" for leg in legs)
    print(
        f"\n{'TTFT of document':<18}{'cold':>10}{warm}{'speed-up':>10}"
        f"{'hit tokens':>12}{'MiB':>9}  same text"
    )
    main, *_ = legs.values()
    for rows in zip(*legs.values(), strict=True):
        row = rows[0]
        print(
            f"{row.document:<18}{row.cold_s:>8.3f} s"
            + "".join(f"{other.warm_s:>15.3f} s" for other in rows)
            + f"{row.cold_s / row.warm_s:>9.1f}x{row.hit_tokens:>12,}{row.hit_bytes / MIB:>9.1f}"
            + f"  {'yes' if row.same_text else 'NO'}"
        )
    cold = fmean(row.cold_s for row in main)
    means = [fmean(row.warm_s for row in rows) for rows in legs.values()]
    print(
        f"{'mean':<18}{cold:>8.3f} s"
        + "".join(f"{mean:>15.3f} s" for mean in means)
        + f"{cold / means[0]:>9.1f}x{fmean(row.hit_tokens for row in main):>12,.0f}"
        + f"{fmean(row.hit_bytes for row in main) / MIB:>9.1f}"
    )


def draw(legs: dict[str, list[Row]], title: str, path: Path) -> None:
    """Bars of TTFT, a group a document."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    main, *_ = legs.values()
    series = {"cold": [row.cold_s for row in main]}
    series |= {LABELS[leg]: [row.warm_s for row in rows] for leg, rows in legs.items()}
    width = 0.8 / len(series)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.3 * len(main) + 1), 4), layout="constrained")
    for index, (label, seconds) in enumerate(series.items()):
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(main))]
        color = ("#b8bcc4", "#2f6fb3", "#e0a030")[index]
        bars = axes.bar(places, seconds, width * 0.92, label=label, color=color)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2, color="#444444")
    axes.set_xticks(range(len(main)), [row.document for row in main])
    axes.set_ylabel("time to first token (s)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(visible=True, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper right")
    figure.savefig(path, dpi=150)


def find_faults(legs: dict[str, list[Row]]) -> list[str]:
    """What must not happen, one sentence each."""
    faults = []
    for leg, rows in legs.items():
        if changed := [row.document for row in rows if not row.same_text]:
            faults.append(f"{leg}: the warm answer differs for {', '.join(changed)}")
        if not any(row.hit_tokens for row in rows):
            faults.append(f"{leg}: nothing was reused")
        elif missed := [row.document for row in rows if not row.hit_tokens]:
            faults.append(f"{leg}: no tokens were reused for {', '.join(missed)}")
    return faults


def kv_bytes_per_token(config: Any) -> int:
    """A token's keys and values in every layer, for a model of plain attention layers."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    element_bytes = getattr(config.dtype, "itemsize", 2)
    return 2 * config.num_hidden_layers * kv_heads * head_dim * element_bytes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=6, help="how many (%(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="length of each (%(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--model", help="path or name; by default the small one of model.py")
    parser.add_argument("--output", type=Path, default=Path("demo-results"), help="(%(default)s)")
    parser.add_argument(
        "--legs", nargs="+", choices=LABELS, default=list(LABELS), help="what to run (both)"
    )
    parser.add_argument(
        "--engine-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more of vLLM's engine arguments, e.g. '{\"enforce_eager\": false}'",
    )
    arguments = parser.parse_args()
    if arguments.documents < 1 or arguments.tokens < 1:
        parser.error("--documents and --tokens must be positive")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if not arguments.model:
        from model import prepare_model

        arguments.model = str(prepare_model())
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    token_bytes = kv_bytes_per_token(AutoConfig.from_pretrained(arguments.model).get_text_config())
    warm_up, *documents = write_documents(arguments.documents + 1, arguments.tokens, tokenizer)
    warm_order = list(range(1, len(documents) + 1))
    random.Random(0).shuffle(warm_order)
    length = arguments.tokens + ROOM
    arguments.output.mkdir(parents=True, exist_ok=True)

    answers, legs = {}, {}
    for leg in dict.fromkeys(arguments.legs):
        job = Job(
            leg=leg,
            model=arguments.model,
            prompts=[document.prompt for document in (warm_up, *documents)],
            warm_order=warm_order,
            answer_tokens=arguments.answer_tokens,
            kv_bytes=token_bytes * length * (len(documents) + 1),
            engine_args={"max_model_len": length, "enforce_eager": True, **arguments.engine_args},
        )
        answers[leg] = watch_leg(job, arguments.output / f"{leg}.log")
        legs[leg] = make_rows(documents, answers[leg], token_bytes)

    print_table(legs)
    faults = find_faults(legs)
    title = (
        f"{len(documents)} documents of {arguments.tokens:,} tokens, {Path(arguments.model).name}"
    )
    report = {
        "title": title,
        "kv_bytes_per_token": token_bytes,
        "documents": {leg: [asdict(row) for row in rows] for leg, rows in legs.items()},
        "answers": {leg: [asdict(answer) for answer in given] for leg, given in answers.items()},
        "faults": faults,
    }
    path = arguments.output / "long_document_qa.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{path}")
    try:
        draw(legs, title, path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no plot: {error}; try `pip install matplotlib`")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
