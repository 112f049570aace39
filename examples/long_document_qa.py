"""Ask about long documents, then ask again: what a KV cache outside the engine saves.

    python examples/long_document_qa.py [--documents 6] [--tokens 2048] [--model M] [--output DIR]

Each leg is a fresh vLLM in a process of its own and answers one question at a time:

* `lmcache`: vLLM with the LMCache connector and without its own prefix cache. Every document once
  (cold), then all of them again in another order (warm).
* `prefix-cache`: the same questions to vLLM's own prefix cache, without LMCache, for comparison.

TTFT is the time from handing a request to vLLM until its first token is back, around the stream
that `vllm serve` reads too. Another document is asked about first, twice, so that compilation and
first touches of memory are not counted. Hit tokens are those that vLLM says it did not compute;
their bytes follow from the model's geometry. The exit status is 1 if an answer changed or a
document was not reused. Without a GPU, on two cores, all of it takes three to four minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

GIB = 1 << 30
MIB = 1 << 20
LMCACHE = "lmcache"
PREFIX_CACHE = "prefix-cache"
LABELS = {LMCACHE: "LMCache hit", PREFIX_CACHE: "vLLM prefix hit"}
CHILD = "--child"
COLORS = ("#b8bcc4", "#2f6fb3", "#e0a030")
ROOM = 256
"""Tokens for the question and the answer, after the document."""


# --- documents ------------------------------------------------------------------------------------

TOWN = "Ash Birk Cold Dun Elm Fair Glen Hazel Iron Karl Lang Marsh North Oak Quarry Raven".split()
ENDING = "ford mere sund wick holm stead bury dale haven field".split()
GIVEN = "Marta Johan Ilse Peter Agnes Tomas Clara Henrik Vera Oscar Hanna Julian Edith".split()
FAMILY = "Lindqvist Barlow Castellan Dreyer Holloway Ferrand Okafor Petrov Marsden Tanaka".split()
WHO = """the surveyor, a retired captain, the school, the parish council, an old ferryman,
    the railway company, a travelling botanist, the miller, the harbour commission, a young
    engineer, the clerk of works, the printer's widow"""
DID = """repaired, measured, argued about, sold, photographed, rebuilt, mapped, painted,
    described, inspected, paid for, abandoned"""
WHAT = """the stone bridge, the eastern sea wall, a flock of wintering geese, the town archive,
    the clock above the market, two fishing boats, the road to the quarry, a collection of maps,
    the orchard behind the mill, the telegraph line, the granary, the northern lighthouse"""
WHY = """because the flood had come early, before the first frost, at considerable expense,
    although nobody had asked for it, with help from the neighbouring villages, while the minister
    was away, after a long debate, to the surprise of the newspapers, as the charter required"""


@dataclass(frozen=True)
class Document:
    """A text of a given number of tokens, and a question that its beginning answers."""

    title: str
    prompt: list[int]


def write_documents(count: int, tokens: int, tokenizer: Any) -> list[Document]:
    """Documents that differ from their first words on, the same ones in every run."""
    towns = [first + second for first, second in itertools.product(TOWN, ENDING)]
    if count > len(towns):
        sys.exit(f"there are names for no more than {len(towns) - 1} documents")
    random.Random(0).shuffle(towns)
    return [write_document(town, tokens, tokenizer) for town in towns[:count]]


def write_document(town: str, tokens: int, tokenizer: Any) -> Document:
    rng = random.Random(town)
    keeper = f"{rng.choice(GIVEN)} {rng.choice(FAMILY)}"
    text = f"{town}, a chronicle. The keeper of the archive of {town} is {keeper}."
    prompt: list[int] = []
    story = tell(town, rng)
    while len(prompt) < tokens:
        text += "".join(itertools.islice(story, 50))
        prompt = tokenizer.encode(text, add_special_tokens=False)
    question = (
        f"\n\nQuestion: Who is the keeper of the archive of {town}?"
        f"\nAnswer: The keeper of the archive of {town} is"
    )
    return Document(town, prompt[:tokens] + tokenizer.encode(question, add_special_tokens=False))


def tell(town: str, rng: random.Random) -> Iterator[str]:
    who, did, what, why = (" ".join(words.split()).split(", ") for words in (WHO, DID, WHAT, WHY))
    while True:
        year = rng.randrange(1780, 1930)
        deed = f"{rng.choice(who)} {rng.choice(did)} {rng.choice(what)} {rng.choice(why)}"
        yield rng.choice(
            [
                f" In {year} {deed}.",
                f" The chronicle of {town} says that {deed}.",
                f" Some years later, in {year}, {deed}, and {rng.choice(who)} wrote about it.",
            ]
        )


# --- one leg, in a process of its own -------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a leg is to do."""

    leg: str
    engine_args: dict[str, Any]
    prompts: list[list[int]]
    """The first one is the warm-up."""
    warm_order: list[int]
    answer_tokens: int
    kv_bytes: int
    """KV of all prompts and answers, which each cache must be able to hold."""


@dataclass(frozen=True)
class Answer:
    """What one request took and gave."""

    phase: str
    document: int
    ttft_s: float
    total_s: float
    hit_tokens: int
    text: str


def run_leg() -> None:
    """The child's main function: a job comes in, answers go out, and all else goes to stderr."""
    job = Job(**json.load(sys.stdin))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    gib = job.kv_bytes / GIB
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(gib)),
        "LMCACHE_LOCAL_CPU": "True",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": f"{gib + 0.5:.1f}",
    }
    for name, text in defaults.items():
        os.environ.setdefault(name, text)
    asyncio.run(ask_all(job, answers))


async def ask_all(job: Job, answers: TextIO) -> None:
    from vllm import SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    connector = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            kv_transfer_config=connector if job.leg == LMCACHE else None,
            enable_prefix_caching=job.leg == PREFIX_CACHE,
            **job.engine_args,
        )
    )
    params = SamplingParams(temperature=0.0, max_tokens=job.answer_tokens)
    documents = range(1, len(job.prompts))
    phases = {"warm-up": [0, 0], "cold": documents, "warm": job.warm_order}
    try:
        for phase, numbers in phases.items():
            for turn, number in enumerate(numbers):
                prompt = {"prompt_token_ids": job.prompts[number]}
                start = time.perf_counter()
                arrivals = []
                async for output in engine.generate(prompt, params, f"{phase}-{turn}"):
                    arrivals.append((time.perf_counter() - start, output))
                (ttft_s, _), (total_s, last) = arrivals[0], arrivals[-1]
                hit, text = last.num_cached_tokens or 0, last.outputs[0].text
                answer = Answer(phase, number, ttft_s, total_s, hit, text)
                answers.write(json.dumps(asdict(answer)) + "\n")
    finally:
        engine.shutdown()


# --- the parent -----------------------------------------------------------------------------------


def watch_leg(job: Job, log: Path) -> list[Answer]:
    """Run a leg to its end, and tell how it gets on."""
    print(f"\n{job.leg}: starting vLLM; its log is {log}", flush=True)
    answers: list[Answer] = []
    count = len(job.prompts) - 1
    with (
        log.open("w") as sink,
        subprocess.Popen(  # noqa: S603  it runs this very file
            [sys.executable, __file__, CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
        ) as child,
    ):
        assert child.stdin
        assert child.stdout
        json.dump(asdict(job), child.stdin)
        child.stdin.close()
        for line in child.stdout:
            answer = Answer(**json.loads(line))
            answers.append(answer)
            done = sum(answer.phase == other.phase for other in answers)
            first_line, *_ = answer.text.strip().split("\n")
            print(
                f"  {answer.phase:<8} {done}/{2 if answer.phase == 'warm-up' else count}"
                f"   TTFT {answer.ttft_s:7.3f} s   hit {answer.hit_tokens:>6,} tokens"
                f"   {first_line}",
                flush=True,
            )
    if len(answers) < 2 + 2 * count:
        print(*log.read_text(errors="replace").splitlines()[-25:], sep="\n", file=sys.stderr)
        sys.exit(f"the {job.leg} leg ended early; {log} has the whole story")
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

    @classmethod
    def make(cls, title: str, cold: Answer, warm: Answer, token_bytes: int) -> Row:
        hit = warm.hit_tokens
        same = warm.text == cold.text
        return cls(title, cold.ttft_s, warm.ttft_s, hit, hit * token_bytes, same)


def make_rows(documents: list[Document], answers: list[Answer], token_bytes: int) -> list[Row]:
    found = {(answer.phase, answer.document): answer for answer in answers}
    return [
        Row.make(document.title, found["cold", number], found["warm", number], token_bytes)
        for number, document in enumerate(documents, start=1)
    ]


def print_table(legs: dict[str, list[Row]]) -> None:
    """A line for each document; all but the other legs' TTFT is the first leg's."""
    labels = "".join(f"{LABELS[leg]:>17}" for leg in legs)
    print(f"\nTTFT{'cold':>19}{labels}{'speed-up':>10}{'hit tokens':>12}{'MiB':>8}  same text")

    def line(name: str, cold: float, warm: list[float], hit: float, size: float, end: str) -> None:
        times = "".join(f"{seconds:>15.3f} s" for seconds in warm)
        print(
            f"{name:<14}{cold:>7.3f} s{times}{cold / warm[0]:>9.1f}x{hit:>12,.0f}"
            f"{size / MIB:>8.1f}  {end}"
        )

    for row, *others in zip(*legs.values(), strict=True):
        warm = [row.warm_s, *(other.warm_s for other in others)]
        same = "yes" if row.same_text else "NO"
        line(row.document, row.cold_s, warm, row.hit_tokens, row.hit_bytes, same)
    first, *_ = legs.values()
    line(
        "mean",
        fmean(row.cold_s for row in first),
        [fmean(row.warm_s for row in rows) for rows in legs.values()],
        fmean(row.hit_tokens for row in first),
        fmean(row.hit_bytes for row in first),
        f"{sum(row.same_text for row in first)} of {len(first)}",
    )


def draw(legs: dict[str, list[Row]], title: str, path: Path) -> None:
    """Bars of TTFT, a group for each document."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, *_ = legs.values()
    series = {"cold": [row.cold_s for row in first]}
    series |= {LABELS[leg]: [row.warm_s for row in rows] for leg, rows in legs.items()}
    width = 0.8 / len(series)
    figure, axes = pyplot.subplots(figsize=(max(6, 1.4 * len(first)), 4), layout="constrained")
    for index, (label, seconds) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * width
        places = [place + offset for place in range(len(first))]
        bars = axes.bar(places, seconds, width * 0.92, label=label, color=COLORS[index])
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2, color="#444444")
    axes.set_xticks(range(len(first)), [row.document for row in first])
    axes.set_ylabel("time to first token (s)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(visible=True, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper right")
    figure.savefig(path, dpi=150)


def find_faults(legs: dict[str, list[Row]]) -> Iterator[str]:
    """What must not happen, a sentence each."""
    for leg, rows in legs.items():
        if changed := [row.document for row in rows if not row.same_text]:
            yield f"{leg}: the warm answer differs for {', '.join(changed)}"
        if not any(row.hit_tokens for row in rows):
            yield f"{leg}: nothing was reused"
        elif missed := [row.document for row in rows if not row.hit_tokens]:
            yield f"{leg}: no token was reused for {', '.join(missed)}"


def kv_bytes_per_token(config: Any) -> int:
    """What a token's keys and values take, in a model of plain attention layers."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    element_bytes = getattr(config.dtype, "itemsize", 2)
    return 2 * config.num_hidden_layers * kv_heads * head_dim * element_bytes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--documents", type=int, default=6, help="how many (%(default)s)")
    add("--tokens", type=int, default=2048, help="length of each (%(default)s)")
    add("--answer-tokens", type=int, default=24, help="length of an answer (%(default)s)")
    add("--model", help="path or name; by default the small one that model.py prepares")
    add("--output", type=Path, default=Path("demo-results"), help="(%(default)s)")
    add("--legs", nargs="+", choices=LABELS, default=list(LABELS), help="what to run (both)")
    add(
        "--engine-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more of vLLM's engine arguments, for instance '{\"enforce_eager\": false}'",
    )
    arguments = parser.parse_args()
    if min(arguments.documents, arguments.tokens, arguments.answer_tokens) < 1:
        parser.error("--documents, --tokens and --answer-tokens must be positive")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if not arguments.model:
        from model import prepare_model

        arguments.model = str(prepare_model())
    from transformers import AutoConfig, AutoTokenizer

    count = arguments.documents
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    token_bytes = kv_bytes_per_token(AutoConfig.from_pretrained(arguments.model).get_text_config())
    warm_up, *documents = write_documents(1 + count, arguments.tokens, tokenizer)
    arguments.output.mkdir(parents=True, exist_ok=True)
    length = arguments.tokens + ROOM + arguments.answer_tokens
    engine_args = {"model": arguments.model, "max_model_len": length, "enforce_eager": True}

    answers, legs = {}, {}
    for leg in dict.fromkeys(arguments.legs):
        job = Job(
            leg=leg,
            engine_args=engine_args | arguments.engine_args,
            prompts=[document.prompt for document in (warm_up, *documents)],
            warm_order=random.Random(0).sample(range(1, 1 + count), count),
            answer_tokens=arguments.answer_tokens,
            kv_bytes=token_bytes * length * (1 + count),
        )
        answers[leg] = watch_leg(job, arguments.output / f"{leg}.log")
        legs[leg] = make_rows(documents, answers[leg], token_bytes)

    print_table(legs)
    faults = list(find_faults(legs))
    title = f"{count} documents of {arguments.tokens:,} tokens, {Path(arguments.model).name}"
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
    run_leg() if sys.argv[1:] == [CHILD] else main()
