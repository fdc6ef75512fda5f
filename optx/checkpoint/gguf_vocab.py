"""The vocabulary in a GGUF file's metadata as a `tokenizers.Tokenizer` with the same ids.

Keys, token types and the names of pre-tokenizers are llama.cpp's (`llama-vocab.cpp`); the split patterns are those of
the models' own tokenizer.json files. Two kinds are known: "gpt2", byte-level BPE with its merges in the file, and
"llama", a SentencePiece BPE whose merges follow from the pieces' scores.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from optx.errors import CheckpointError, did_you_mean

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"  # SentencePiece's visible space

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE
_MARKED_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _WHITESPACE
_TEKKEN = "|".join([*_CASED, r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*", _WHITESPACE])
_GPT4O = "|".join(
    [f"{case}{_CONTRACTION}?" for case in _CASED] + [r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*", _WHITESPACE]
)
_DEEPSEEK = _ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _WHITESPACE


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before BPE: each pattern in turn splits what the one before left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is in the vocabulary as a whole is that token, whatever the merges say
    add_bos: bool = False  # unless the file says otherwise


_PRE_TOKENIZERS = {
    PreTokenizer((_GPT2,)): ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"),
    PreTokenizer((r"\p{N}", _GPT2)): (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    PreTokenizer((_WORDS % "{1,3}",)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    PreTokenizer((_WORDS % "{1,3}",), ignore_merges=True, add_bos=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
    ),
    PreTokenizer((_WORDS % "",)): ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"),
    PreTokenizer((_MARKED_WORDS,)): ("qwen35",),
    PreTokenizer((_GPT4O,)): ("gpt-4o", "llama4", "minimax-m2"),
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
    PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK)): ("deepseek-v3", "hunyuan-dense"),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for pre, names in _PRE_TOKENIZERS.items() for name in names}

_TURN_ENDS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>"),
    *("<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
}


@dataclass(frozen=True)
class Vocabulary:
    """A backend with its ids, and what the file says about beginning and end of text."""

    backend: tokenizers.Tokenizer
    tokens: list[str]
    types: list[int]
    add_bos: bool

    def turn_ends(self) -> set[int]:
        """Control tokens that llama.cpp knows by their text to end a turn; a file names one or two at most.

        Harmony models (gpt-oss) write `<|end|>` between the parts of a turn and `<|return|>` after it.
        """
        ends = {token: i for i, token in enumerate(self.tokens) if token in _TURN_ENDS and self.types[i] == CONTROL}
        if "<|return|>" in ends:
            ends.pop("<|end|>", None)
        return set(ends.values())


def read_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """The vocabulary of a GGUF file. Raises CheckpointError, naming the key, for one that is absent or malformed."""
    model = metadata.get(_PREFIX + "model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(model, str) or model not in builders:
        raise CheckpointError(f"{_PREFIX}model: got {model!r}{did_you_mean(str(model), builders)}")
    tokens = _array(metadata, "tokens", str)
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(f"{_PREFIX}tokens: got {twice!r} twice, allowed: one id a token")
    types = _array(metadata, "token_type", int, len(tokens)) if _PREFIX + "token_type" in metadata else []
    types = types or [NORMAL] * len(tokens)
    backend, add_bos = builders[model](metadata, tokens, types)
    _add_tokens(backend, tokens, types)
    return Vocabulary(backend, tokens, types, _flag(metadata, "add_bos_token", add_bos))


def token_id(metadata: Mapping[str, object], name: str, vocab_size: int) -> int | None:
    """`tokenizer.ggml.<name>_token_id`, or None where the file has none."""
    value = metadata.get(f"{_PREFIX}{name}_token_id")
    if value is not None and not (type(value) is int and 0 <= value < vocab_size):
        raise CheckpointError(f"{_PREFIX}{name}_token_id: got {value!r}, allowed: 0 to {vocab_size - 1}")
    return value


def _byte_level(
    metadata: Mapping[str, object], tokens: list[str], types: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """GPT-2's BPE over bytes written as printable characters."""
    name = metadata.get(_PREFIX + "pre", "default")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise CheckpointError(f"{_PREFIX}pre: got {name!r}, allowed: {', '.join(sorted(PRE_TOKENIZERS))}")
    merges = _listed_merges(_array(metadata, "merges", str), tokens)
    backend = _bpe(tokens, merges, ignore_merges=pre.ignore_merges)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(
    metadata: Mapping[str, object], tokens: list[str], types: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """SentencePiece's BPE: of all neighbours, the pair whose union scores highest is merged first.

    Characters without a piece become their UTF-8 bytes. Text is one word: merges may cross spaces.
    """
    scores = _array(metadata, "scores", float, len(tokens))
    unknown = token_id(metadata, "unknown", len(tokens))
    backend = _bpe(
        tokens,
        _merges_from_scores(tokens, scores, types),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )
    prefix = _flag(metadata, "add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best third first.

    Only ordinary pieces take part, as in SentencePiece: text never becomes a control, byte or user-defined token by
    merging. Of one piece's splits the longest left part goes first, which agrees with SentencePiece's rule that the
    leftmost pair wins: in a run of one character the longer merge always stands to the left.
    """
    pieces = {
        token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind in (NORMAL, UNUSED)
    }
    merges = []
    for piece in sorted(pieces, key=pieces.__getitem__, reverse=True):
        for at in range(len(piece) - 1, 0, -1):
            if piece[:at] in pieces and piece[at:] in pieces:
                merges.append((piece[:at], piece[at:]))
    return merges


def _listed_merges(texts: list[str], tokens: list[str]) -> list[tuple[str, str]]:
    """The file's merges, best first: "left right", where the first character may itself be a space."""
    known = set(tokens)
    merges = []
    for text in texts:
        rest, _, right = text[1:].partition(" ")
        left = text[:1] + rest
        if not {left, right, left + right} <= known:
            got = f"{left!r} + {right!r}"
            raise CheckpointError(f"{_PREFIX}merges: got {got}, allowed: two tokens whose union is a token")
        merges.append((left, right))
    return merges


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options) -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens are special; user-defined ones are found in text before anything else."""
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    backend.add_tokens(added)


def _array(metadata: Mapping[str, object], name: str, item: type, length: int | None = None) -> list:
    value = metadata.get(_PREFIX + name)
    allowed = f"an array of {item.__name__}" + (f" as long as tokens ({length})" if length is not None else "")
    if not isinstance(value, list):
        raise CheckpointError(f"{_PREFIX}{name}: got {type(value).__name__}, allowed: {allowed}")
    items = (int, float) if item is float else item
    wrong = [entry for entry in value if not isinstance(entry, items)]
    if wrong:
        raise CheckpointError(f"{_PREFIX}{name}: got the entry {wrong[0]!r}, allowed: {allowed}")
    if length is not None and len(value) != length:
        raise CheckpointError(f"{_PREFIX}{name}: got {len(value)} entries, allowed: {allowed}")
    return value


def _flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{_PREFIX}{name}: got {value!r}, allowed: true or false")
    return value
