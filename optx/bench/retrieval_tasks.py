"""Generated prompts whose answer stands somewhere in a long text, exact in tokens, and how answers are scored.

`needle`: one sentence with a number in filler text, asked for at the end (needle in a haystack). `multikey`: the same among
many such sentences with other words (RULER, arXiv:2404.06654, its multi-key NIAH). The question is a sentence to be completed, so
that models without a chat template can answer.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from optx.errors import RequestError
from optx.tokenizer import Tokenizer

Task = Literal["needle", "multikey"]
TASKS: tuple[Task, ...] = ("needle", "multikey")
NEEDLE = " The special magic number for {word} is {number}."
QUESTION = " The special magic number for {word} is"
DIGITS = 7
_WORDS = """
anchor apple arrow basket beacon blanket bottle button candle carpet castle cherry circle cotton desert dragon eagle engine
fabric falcon feather forest garden guitar hammer helmet honey island jacket jungle kettle ladder lantern lemon magnet
marble meadow mirror needle ocean orchid paddle pencil pepper pillow pirate planet pocket rabbit ribbon river rocket saddle
shadow silver spider summit temple thunder tiger tunnel velvet violin walnut window winter wizard yellow zebra
"""
WORDS = tuple(_WORDS.split())
# Parts of a filler sentence, without digits and without what a needle says.
_PARTS = """
The old|A young|The quiet|Every tall|The last|A patient|The other|One careful|Their new|Another tired
gardener|painter|baker|sailor|teacher|farmer|writer|driver|carpenter|doctor|neighbour|student
walked past|looked at|talked about|waited beside|cleaned|remembered|painted|visited|drew|left
the harbour|the green gate|a stone bridge|the market|the empty station|a small boat|the long road|the library
in the morning|after the rain|before supper|late in the year|without a word|on the way home|as usual
"""
PARTS = tuple(line.split("|") for line in _PARTS.split("\n") if line)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What prompts are made from; together with a cell's length, depth and sample it determines each of them."""

    task: Task = "needle"
    keys: int = 8  # sentences with numbers of `multikey`; `needle` has one
    seed: int = 0
    text: str | None = None  # filler is taken from it; None: generated sentences

    def __post_init__(self):
        if self.task not in TASKS:
            raise RequestError(f"retrieval.task: got {self.task!r}; allowed: {', '.join(TASKS)}")
        if not 2 <= self.keys <= len(WORDS):
            raise RequestError(f"retrieval.keys: got {self.keys}; allowed: 2 to {len(WORDS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question."""

    ids: tuple[int, ...]
    number: str  # the right answer
    answer: tuple[int, ...]  # its tokens, after the prompt's


class Maker:
    """Makes prompts for one tokenizer. Raises RequestError where there is none, or where the filler has no sentence."""

    def __init__(self, setting: Setting, tokenizer: Tokenizer | None):
        if tokenizer is None:
            raise RequestError("retrieval: the model has no tokenizer, and its prompts are text; take a model with one")
        self.setting, self.tokenizer = setting, tokenizer
        self.start = () if tokenizer.bos_id is None or not tokenizer.add_bos else (tokenizer.bos_id,)
        self.sentences = None if setting.text is None else _sentences(setting.text)
        self._encode = functools.lru_cache(maxsize=100_000)(self._encoded)

    def prompt(self, length: int, depth: float, sample: int) -> Prompt:
        """A prompt of exactly `length` tokens, whose needle lies at the sentence end nearest to `depth` (0: the start, 1: the
        end) of the filler. The same arguments give the same prompt, whatever else is asked for.

        Raises RequestError where the sentences with numbers and the question do not fit.
        """
        rng = np.random.default_rng([self.setting.seed, length, round(1e6 * depth), sample])
        count = 1 if self.setting.task == "needle" else self.setting.keys
        words = [str(word) for word in rng.choice(WORDS, count, replace=False)]
        numbers = [
            str(number) for number in rng.choice(9 * 10 ** (DIGITS - 1), count, replace=False) + 10 ** (DIGITS - 1)
        ]
        needles = [self._encode(NEEDLE.format(word=w, number=n)) for w, n in zip(words, numbers, strict=True)]
        question, answer = self._question(words[0], numbers[0])
        room = length - len(self.start) - sum(map(len, needles)) - len(question)
        if room < 0:
            told = f"what a prompt of task {self.setting.task!r} holds besides filler took {length - room} tokens"
            raise RequestError(f"retrieval.length: got {length}; {told}; allowed: more than that, or fewer --keys")
        filler, ends = self._filler(room, rng)
        near = min(ends, key=lambda end: abs(end - depth * room))
        places = [near, *(int(rng.choice(ends)) for _ in needles[1:])]
        ids = list(self.start)
        last = 0
        for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
            ids += [*filler[last:place], *needle]
            last = place
        return Prompt(ids=(*ids, *filler[last:], *question), number=numbers[0], answer=answer)

    def answer_tokens(self) -> int:
        """The most tokens that an answer takes."""
        return max(len(self._question(WORDS[0], digit * DIGITS)[1]) for digit in "123456789")

    def _question(self, word: str, number: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of the question, and of the answer as they follow it."""
        question = self._encode(QUESTION.format(word=word))
        both = self._encode(QUESTION.format(word=word) + f" {number}")
        if both[: len(question)] != question:
            raise RequestError("retrieval: this model's tokenizer joins the question's last word with the number")
        return question, both[len(question) :]

    def _filler(self, room: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """`room` tokens of running sentences that end with a whole one, and where sentences end in them, 0 among these."""
        ids, ends, at = [], [0], None if self.sentences is None else int(rng.integers(len(self.sentences)))
        while len(ids) < room:
            if self.sentences is None:
                text = f" {' '.join(str(rng.choice(part)) for part in PARTS)}."
            else:
                text, at = f" {self.sentences[at]}", (at + 1) % len(self.sentences)
            ids += self._encode(text)
            ends.append(len(ids))
        cut = len(ids) - room
        return ids[cut:], sorted({max(0, end - cut) for end in ends})

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special=False))


def _sentences(text: str) -> list[str]:
    found = [sentence for sentence in SENTENCE_END.split(" ".join(text.split())) if sentence]
    if not found:
        raise RequestError("retrieval.text: the file holds no sentence; give one with text, or leave --text out")
    return found


def right(answer: str, number: str) -> bool:
    """Whether the first number in an answer is the right one, digit for digit."""
    found = re.search(r"\d+", answer)
    return found is not None and found[0] == number


class Forced:
    """A grammar of one answer, given as tokens: what a model holds of it is read off their log-probabilities."""

    def __init__(self, ids: Sequence[int]):
        self.ids = tuple(ids)

    def matcher(self) -> "_Forced":
        return _Forced(self.ids)


class _Forced:
    reason = ""

    def __init__(self, ids: tuple[int, ...]):
        self._left = list(ids)

    def mask(self) -> np.ndarray:
        words = np.zeros(self._left[0] // 32 + 1 if self._left else 1, np.uint32)
        if self._left:
            words[-1] = np.uint32(1 << self._left[0] % 32)
        return words

    def accept(self, token: int) -> None:
        self._left.pop(0)

    @property
    def done(self) -> bool:
        return not self._left
