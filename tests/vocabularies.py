"""Small vocabularies as a GGUF's metadata has them, and tokenizers written from their definition: slow and plain."""

import functools
import json
import re
from collections.abc import Callable

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

SPACE = "\u2581"
CORPUS = [
    "the cat sat on the mat, then the cat's hat 1234 2024 was on that mat. ",
    "naïve café — 日本語 日本 🤽🏽‍♀️!\n\n\tend",
] * 4
TEMPLATE = (
    "{% for m in messages %}{{ '<|end|>' if not loop.first }}{{ m.role + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant: {% endif %}"
)
SAMPLES = [
    "",
    " ",
    "the cat's hat",
    "  the   cats\n\n\n sat\tthere \n",
    "12345 678 ٣ ½",
    "naïve café — 日本語, 🤽🏽‍♀️ 𝔹ﷺ\u0301",
    "<unk><|end|> <0x41> </s>",
    "ttttthhhheeee aaaaaaaaaaa",
    "THE CAT'S don't I'LL\r\n\r\nx \u3000y\x00z",
]


def _learn(byte_level: bool) -> tuple[list[str], list[str]]:
    """Tokens and merges of a small BPE over bytes, or over characters with visible spaces."""
    backend = tokenizers.Tokenizer(models.BPE())
    options = {"vocab_size": 420, "show_progress": False}
    if byte_level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    texts = CORPUS if byte_level else [text.replace(" ", SPACE) for text in CORPUS]
    backend.train_from_iterator(texts, trainers.BpeTrainer(**options))
    model = json.loads(backend.to_str())["model"]
    return list(model["vocab"]), [" ".join(pair) for pair in model["merges"]]


@functools.cache
def byte_level() -> dict[str, object]:
    """Byte-level BPE with a control and a user-defined token at the end."""
    tokens, merges = _learn(byte_level=True)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*tokens, "<|end|>", "<think>"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens),
        "tokenizer.chat_template": TEMPLATE,
    }


@functools.cache
def sentencepiece() -> dict[str, object]:
    """SentencePiece: controls, bytes, user-defined tokens, then pieces by falling score."""
    tokens, merges = _learn(byte_level=False)
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "\n\n", "  "]
    joined = dict.fromkeys(merge.replace(" ", "") for merge in merges)
    pieces = [piece for piece in joined if "\n" not in piece]
    pieces += [token for token in tokens if len(token) == 1 and token != "\n"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": head + pieces,
        "tokenizer.ggml.scores": [0.0] * len(head) + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [4] * 3 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }


def slow_sentencepiece(metadata: dict[str, object]) -> Callable[[str], list[int]]:
    """Merges the neighbours whose union scores highest, leftmost first; user-defined tokens are cut out before."""
    tokens, scores, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    ids = {token: i for i, token in enumerate(tokens)}
    pieces = {token: scores[i] for token, i in ids.items() if types[i] == 1}
    user = sorted((token for token, i in ids.items() if types[i] == 4), key=len, reverse=True)
    cut = re.compile("(" + "|".join(map(re.escape, user)) + ")")

    def encode_part(text: str) -> list[int]:
        if text in ids and types[ids[text]] == 4:
            return [ids[text]]
        symbols = list(text.replace(" ", SPACE))
        while pairs := [(-pieces[a + b], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in pieces]:
            at = min(pairs)[1]
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        spelled = [[s] if s in pieces else [f"<0x{byte:02X}>" for byte in s.encode("utf-8")] for s in symbols]
        return [ids[token] for tokens in spelled for token in tokens]

    return lambda text: [index for part in cut.split(text) for index in encode_part(part)]


def slow_byte_level(metadata: dict[str, object], words: str) -> Callable[[str], list[int]]:
    """Applies the first merge of the list until none is left, in each word that the plain `re` pattern finds. ASCII."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    letters = {0x20: "Ġ", 0x0A: "Ċ", 0x09: "ĉ"}

    def encode_word(word: str) -> list[int]:
        symbols = [letters.get(byte, chr(byte)) for byte in word.encode("ascii")]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]:
            at = min(pairs)[1]
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        return [ids[symbol] for symbol in symbols]

    return lambda text: [index for word in re.findall(words, text) for index in encode_word(word)]
