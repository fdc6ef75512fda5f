"""Answers that follow a grammar: JSON Schema, JSON objects, regular expressions, Lark and EBNF grammars.

At every token a matcher says which tokens may come next, as one bit a token; the engine makes all others impossible on
the device. Parsing is llguidance's (github.com/guidance-ai/llguidance): derivatives of regular expressions as the lexer,
Earley's algorithm above it, masks over a trie of the vocabulary's bytes, so that a token may span several terminals.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from optx.errors import RequestError
from optx.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_SPECIAL = b"\xff"  # llguidance's mark, no byte of UTF-8: tokens that begin with it match no text
# Spaces that may stand between two parts of a JSON text. Without a bound a model can go on with them to its last token.
_SPACING = {"x-guidance": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}}
_DOCS = "https://github.com/guidance-ai/llguidance/blob/main/docs"
_NEXT = {
    "json_schema": f"the keywords that can be held to: {_DOCS}/json_schema.md",
    "regex": "allowed: the syntax of Rust's regex crate without look-around: https://docs.rs/regex/latest/regex/#syntax",
    "lark": f"the syntax: {_DOCS}/syntax.md",
    "ebnf": "the syntax, llama.cpp's GBNF: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Grammar:
    """What answers may look like, compiled for one tokenizer: `Sampling(grammar=Grammar.json_schema(schema, tokenizer))`.

    Compiling takes milliseconds, for large schemas more, and is cached by text: any thread may do it, before the engine
    has the request.
    """

    kind: str  # "json_schema", "regex", "lark" or "ebnf"
    text: str  # as it was given; schemas as JSON
    _start: "LLMatcher" = dataclasses.field(repr=False)
    _vocab: int = dataclasses.field(repr=False)

    @classmethod
    def json_schema(cls, schema: Mapping[str, object], tokenizer: Tokenizer) -> "Grammar":
        """JSON texts that a schema describes (json-schema.org, drafts 4 to 2020-12), properties in the schema's order.

        Objects without `additionalProperties: false` may hold further properties. Up to 32 spaces or line ends may stand
        between two parts; `"x-guidance": {"whitespace_flexible": false}` in the schema allows none.
        Raises RequestError for what is no schema, for one that nothing satisfies, and for keywords that masks cannot
        hold an answer to.
        """
        if not isinstance(schema, Mapping):
            raise RequestError(f"json_schema: got {type(schema).__name__}; allowed: an object")
        try:
            text = json.dumps(_SPACING | dict(schema), allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise RequestError(f"json_schema: {error}; allowed: what JSON can hold") from error
        except RecursionError as error:
            raise RequestError("json_schema: nested too deeply; allowed: some hundred levels") from error
        return _compile("json_schema", text, tokenizer)

    @classmethod
    def json_object(cls, tokenizer: Tokenizer) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, tokenizer)

    @classmethod
    def regex(cls, pattern: str, tokenizer: Tokenizer) -> "Grammar":
        """Texts that a regular expression matches from end to end. Raises RequestError for one with an error in it."""
        return _compile("regex", _text("regex", pattern), tokenizer)

    @classmethod
    def lark(cls, grammar: str, tokenizer: Tokenizer) -> "Grammar":
        """Texts that rule `start` of a context-free grammar in Lark's notation derives. Raises RequestError."""
        return _compile("lark", _text("lark", grammar), tokenizer)

    @classmethod
    def ebnf(cls, grammar: str, tokenizer: Tokenizer) -> "Grammar":
        """Texts that rule `root` of a grammar in llama.cpp's notation, GBNF, derives. Raises RequestError."""
        return _compile("ebnf", _text("ebnf", grammar), tokenizer)

    def matcher(self) -> "Matcher":
        """A matcher before the first token; one for each answer."""
        return Matcher(self._start.deep_copy(), self._vocab)


class Matcher:
    """How far one answer has come in its grammar. Not to be shared between threads."""

    def __init__(self, inner: "LLMatcher", vocab: int):
        self._inner = inner
        self._vocab = vocab
        self._exhausted = False

    def mask(self) -> np.ndarray:
        """-> uint32[ceil(V / 32)]: token i may come next where bit i % 32 of word i // 32 is set; V is the tokenizer's.

        An end token may come where the text so far is complete, and is all that may come where nothing can follow. No
        bit is set where no token leads on; `reason` says why then.
        """
        words = np.frombuffer(self._inner.compute_bitmask(), np.uint32).copy() if not self._inner.is_error() else None
        if words is None or self._inner.is_error():  # computing it may fail, with the end tokens set
            return np.zeros(-(-self._vocab // 32), np.uint32)
        words = words[: -(-self._vocab // 32)]
        if self._vocab % 32:  # without an end token in the vocabulary there is one past it
            words[-1] &= np.uint32((1 << self._vocab % 32) - 1)
        self._exhausted = not words.any() and self._inner.is_accepting()
        return words

    def accept(self, token: int) -> None:
        """Takes the token that came next. One that `mask` does not allow leaves nothing that may follow."""
        self._inner.consume_token(token)

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing but an end token can follow, or has followed."""
        return not self._inner.is_error() and (self._inner.is_stopped() or self._exhausted)

    @property
    def reason(self) -> str:
        """Why no token may come next, "" where some may or the text is complete."""
        if not self._inner.is_error():
            return ""
        return f"the grammar allows no further token ({self._inner.stop_reason()}): {_line(self._inner.get_error())}"


def _text(kind: str, value: str) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{kind}: got {value!r:.60}; allowed: text, not empty")
    return value


@functools.lru_cache(maxsize=128)
def _compile(kind: str, text: str, tokenizer: Tokenizer) -> Grammar:
    library = _library()
    vocabulary, limits = _vocabulary(tokenizer), library.LLParserLimits(verbose_errors=False)
    source = _SOURCES[kind](library, text)
    wrong, messages = library.LLMatcher.validate_grammar_with_warnings(source, vocabulary, limits=limits)
    if wrong:
        raise RequestError(f"{kind}: {_line(messages[0])}; {_NEXT[kind]}")
    start = library.LLMatcher(vocabulary, source, log_level=0, limits=limits)
    if start.is_error():  # the first tokens are computed only now, within the limits
        raise RequestError(f"{kind}: {_line(start.get_error())}; {_NEXT[kind]}")
    return Grammar(kind=kind, text=text, _start=start, _vocab=tokenizer.vocab_size)


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "grammar: answers that follow a grammar need llguidance: pip install 'optx[serve]'"
        ) from error
    return llguidance


def _from_schema(library: ModuleType, text: str) -> str:
    try:
        return library.LLMatcher.grammar_from_json_schema(text)
    except ValueError as error:
        raise RequestError(f"json_schema: {_line(str(error))}; {_NEXT['json_schema']}") from error


def _from_ebnf(library: ModuleType, text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return library.LLMatcher.grammar_from_lark(gbnf_to_lark(text))
    except Exception as error:  # the converter raises this type itself
        raise RequestError(f"ebnf: {_line(str(error))}; {_NEXT['ebnf']}") from error


_SOURCES = {
    "json_schema": _from_schema,
    "regex": lambda library, text: library.LLMatcher.grammar_from_regex(text),
    "lark": lambda library, text: library.LLMatcher.grammar_from_lark(text),
    "ebnf": _from_ebnf,
}


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer) -> "LLTokenizer":
    """The bytes of every token, special ones marked so that no text matches them."""
    size = tokenizer.vocab_size
    tokens = [(_SPECIAL if tokenizer.is_special(i) else b"") + tokenizer.token_bytes(i) for i in range(size)]
    ends = [i for i in sorted(tokenizer.eos_ids) if i < size]
    for i in ends:
        tokens[i] = _SPECIAL + tokens[i].removeprefix(_SPECIAL)
    if not ends:  # the parser needs one: an id past the vocabulary, which no mask shows
        ends, tokens = [size], [*tokens, _SPECIAL + b"end"]
    library = _library()
    return library.LLTokenizer(library.TokenizerWrapper(_Tokens(tokenizer, tokens, ends)), eos_token=ends)


class _Tokens:
    """A tokenizer as llguidance wants it. Called for bytes that are forced, to force the tokens that the model would write."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], ends: list[int]):
        self.tokens, self.eos_token_id = tokens, ends[0]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Token ids with exactly the bytes of the text: others would not be what the grammar forces."""
        data = text.encode("utf-8")
        for mark in (b"", b"\n"):  # in front of a mark may come a space, but not in front of the text behind it
            ids, head = self._tokenizer.encode(mark.decode() + text, add_special=False), b""
            while ids and head.lstrip(b" ") != mark:
                head += self.tokens[ids.pop(0)]
            if b"".join(self.tokens[i] for i in ids) == data:
                return ids
        return self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        """The longest token first: for text that the tokenizer changes before it splits it (Unicode normal forms)."""
        found, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._most), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), None)
            if end is None:
                break
            found.append(self._ids[data[at:end]])
            at = end
        return found

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        return {word: i for i, word in enumerate(self.tokens) if word and not word.startswith(_SPECIAL)}

    @functools.cached_property
    def _most(self) -> int:
        return max(map(len, self._ids))


def _line(message: str) -> str:
    """The first lines of a message as one, at most 300 characters."""
    return " ".join(message.split("<state>")[0].split())[:300]
