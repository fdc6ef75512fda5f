"""A GGUF's vocabulary: how words are cut before BPE, which tokens end a turn, and what malformed metadata gets."""

import pytest
import tokenizers
import vocabularies
from tokenizers import models, pre_tokenizers
from vocabularies import SAMPLES

from optx.checkpoint.gguf_vocab import PRE_TOKENIZERS
from optx.errors import CheckpointError
from optx.tokenizer import Tokenizer

TEXT = "I'll pay 12345!\n\n  HE'LL"
WORDS = {
    "gpt-2": ["I", "'ll", " pay", " 12345", "!", "\n\n ", " HE", "'", "LL"],
    "smollm": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!", "\n\n ", " HE", "'", "LL"],
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", "!\n\n", " ", " HE", "'LL"],
    "qwen2": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!\n\n", " ", " HE", "'LL"],
    "qwen35": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!\n\n", " ", " HE", "'LL"],
    "gpt-4o": ["I'll", " pay", " ", "123", "45", "!\n\n", " ", " HE'LL"],
    "tekken": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!\n\n", " ", " HE", "'LL"],
    "deepseek-v3": ["I", "'ll", " pay", " ", "123", "45", "!\n\n", " ", " HE", "'LL"],
}


@pytest.fixture
def metadata() -> dict[str, object]:
    return vocabularies.byte_level()


@pytest.mark.parametrize("name", WORDS)
def test_words_before_bpe(name, metadata):
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False})
    words = tokenizer._backend.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:stop] for _, (start, stop) in words] == WORDS[name]


def test_ids_are_those_of_the_tokenizers_librarys_own_rules(metadata):
    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    for name, rule in (("smollm", pre_tokenizers.Sequence([digits, gpt2])), ("gpt-2", gpt2), ("default", gpt2)):
        reference.pre_tokenizer = rule
        tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": name})
        for text in SAMPLES:
            assert tokenizer.encode(text) == reference.encode(text).ids, (name, text)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama_bpe_takes_whole_words_and_begins_with_bos(metadata):
    tokens = [*metadata["tokenizer.ggml.tokens"], "Ġzqzq"]
    longer = metadata | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], 1],
        "tokenizer.ggml.bos_token_id": 0,
    }
    ids = Tokenizer.from_gguf(longer | {"tokenizer.ggml.pre": "llama-bpe"}).encode("a zqzq")
    assert ids[0] == 0 and ids[-1] == len(tokens) - 1
    merged = Tokenizer.from_gguf(longer)
    assert len(tokens) - 1 not in merged.encode("a zqzq") and not merged.add_bos


def test_end_tokens(metadata):
    def ends(names, **ids):
        tokens, types = metadata["tokenizer.ggml.tokens"] + names, metadata["tokenizer.ggml.token_type"]
        extra = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types + [3] * len(names)}
        extra |= {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items()}
        return {tokens[i] for i in Tokenizer.from_gguf(metadata | extra).eos_ids}

    size = len(metadata["tokenizer.ggml.tokens"])
    assert ends([]) == {"<|end|>"}
    assert ends(["<|im_end|>", "<|im_start|>"]) == {"<|end|>", "<|im_end|>"}
    assert ends(["<|return|>", "<|call|>", "<|message|>"], eos=size) == {"<|return|>", "<|call|>"}
    assert ends(["<x>", "<y>"], eot=size, eom=size + 1) == {"<|end|>", "<x>", "<y>"}


BAD_METADATA = [
    ("model", None, r"model: got None; allowed: gpt2, llama"),
    ("model", "t5", "model: got 't5'; allowed"),
    ("model", ["gpt2"], "model: got"),
    ("pre", "smolm", "pre: got 'smolm', allowed: .*smollm"),
    ("pre", 3, "pre: got 3"),
    ("tokens", None, "tokens: got NoneType, allowed: an array of str"),
    ("tokens", ["a", 1], "tokens: got the entry 1"),
    ("tokens", ["a", "b", "a"], "tokens: got 'a' twice"),
    ("token_type", [1], r"token_type: got 1 entries, allowed: .*as long as tokens"),
    ("merges", [None], "merges: got the entry None"),
    ("merges", ["a zzz"], "merges: got 'a' \\+ 'zzz'"),
    ("merges", ["a"], "merges: got 'a' \\+ ''"),
    ("eos_token_id", 1 << 20, "eos_token_id: got 1048576, allowed: 0 to"),
    ("bos_token_id", "1", "bos_token_id: got '1'"),
    ("add_bos_token", 1, "add_bos_token: got 1, allowed: true or false"),
    ("add_bos_token", True, "add_bos_token is true, but no bos token"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_METADATA)
def test_bad_metadata_is_refused(key, value, message, metadata):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{key}": value})


def test_bad_scores_and_templates_are_refused(metadata):
    with pytest.raises(CheckpointError, match="scores: got 1 entries"):
        Tokenizer.from_gguf(vocabularies.sentencepiece() | {"tokenizer.ggml.scores": [0.0]})
    with pytest.raises(CheckpointError, match="chat_template: got int"):
        Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": 3})


def test_the_known_pre_tokenizers():
    assert PRE_TOKENIZERS["default"] == PRE_TOKENIZERS["gpt-2"]
    assert {"smollm", "llama-bpe", "qwen2", "gpt-4o", "tekken", "deepseek-v3"} <= set(PRE_TOKENIZERS)
