"""Answers of a small model on the running device: each alone, against all of them in company, in every mode of the engine.

    python -m optx.bench.verify_engine [--requests 24] [--recipe NAME]

Greedy. In 16-bit arithmetic a batch of another size sums in another order, so that tokens whose logits nearly tie may change
places: where an answer first parts from its own, the two likeliest tokens must lie within TIE of each other. With
`batch_invariant` no token may differ.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import optx
from optx.bench.step import random_weights
from optx.bench.verify_model import QWEN
from optx.recipe import Recipe
from optx.report import table

TIE = 0.05  # nats between the two likeliest tokens
ROOM = {"rows": 8, "context": 512, "chunks": (64, 128), "prefix_cache": False}
MODES = {
    "apart, one tick": {"mixed": False, "ticks": 1, "overlap": False},
    "several ticks": {"mixed": False, "ticks": 16, "overlap": False},
    "overlapped": {"mixed": False, "ticks": 16, "overlap": True},
    "mixed": {"mixed": True, "ticks": 16, "overlap": True},
    "prefix cache": {"mixed": True, "ticks": 16, "prefix_cache": True},
    "preempted": {"mixed": True, "ticks": 16, "pages": 24},
    "drafted": {"mixed": True, "ticks": 16, "speculate": optx.Speculation(method="ngram", tokens=3, always=True)},
    "batch_invariant": {"batch_invariant": True},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of one mode: answers that are those of the same requests alone, and where the others part."""

    mode: str
    equal: int
    requests: int
    gap: float  # nats between the two likeliest tokens where an answer first parts; 0: none does
    preemptions: int
    compiles: int  # after warm-up

    @property
    def right(self) -> bool:
        wanted = self.equal == self.requests if self.mode == "batch_invariant" else self.gap <= TIE
        return wanted and not self.compiles


def model(recipe: str | None) -> optx.Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(QWEN))
        tree = random_weights(optx.load_config(path, "bfloat16").tree)
    return optx.compile(tree, Recipe.from_yaml(recipe) if recipe else None)


def prompts(count: int) -> list[list[int]]:
    """Lengths from 1 to 300 tokens; every third begins as the one before does."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        begin = found[-1][:130] if i % 3 == 2 else []
        found.append(begin + rng.integers(0, QWEN["vocab_size"], 1 + (37 * i) % 170).tolist())
    return found


def answers(engine, asked: Sequence[list[int]], how: optx.Sampling, together: bool) -> list:
    requests = []
    for prompt in asked:
        requests.append(engine.add_request(prompt, how))
        if not together:
            engine.run()
    engine.run()
    return requests


def compare(compiled: optx.Compiled, mode: str, count: int, tokens: int) -> Agreement:
    options, asked = ROOM | MODES[mode], prompts(count)
    plain = {"batch_invariant": True} if "batch_invariant" in options else {"mixed": False, "ticks": 1}
    how = optx.Sampling(max_tokens=tokens, ignore_eos=True, logprobs=2)
    alone = answers(compiled.engine(**ROOM, **plain), asked, how, together=False)
    engine = compiled.engine(**options)
    engine.warm_up(dataclasses.replace(how, logprobs=None))
    programs = engine.compiles
    beside = answers(engine, asked, dataclasses.replace(how, logprobs=None), together=True)
    engine.check()
    gaps, equal = [0.0], 0
    for one, other in zip(alone, beside, strict=True):
        parted = next((i for i, (a, b) in enumerate(zip(one.output, other.output, strict=True)) if a != b), None)
        equal += parted is None
        if parted is not None:
            (_, first), (_, second) = one.logprobs[parted].top
            gaps.append(first - second)
    return Agreement(
        mode=mode, equal=equal, requests=count, gap=max(gaps), preemptions=engine.stats().preemptions,
        compiles=engine.compiles - programs,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--recipe")
    parser.add_argument("--mode", action="append", choices=sorted(MODES))
    args = parser.parse_args()
    compiled, found = model(args.recipe), []
    for mode in args.mode or MODES:
        found.append(compare(compiled, mode, args.requests, args.tokens))
        print(f"{mode}: {found[-1].equal} of {args.requests} equal", file=sys.stderr, flush=True)
    rows = [
        [a.mode, f"{a.equal} of {a.requests}", f"{a.gap:.2g}", f"{a.preemptions}", f"{a.compiles}", "yes" if a.right else "NO"]
        for a in found
    ]  # fmt: skip
    header = ("mode", "answers as alone", "largest gap at a parting", "preemptions", "compiles after warm-up", "right")
    print(f"{jax.devices()[0].device_kind}, {args.recipe or 'bfloat16'}\n{table(header, rows)}")
    return 0 if all(a.right for a in found) else 1


if __name__ == "__main__":
    sys.exit(main())
