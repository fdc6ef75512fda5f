"""Tokenizers: ids as the reference gives them, text as data, streams that equal decoding, files that survive."""

import functools
import json

import numpy as np
import pytest
import tokenizers
import vocabularies
from tokenizers import decoders, models
from vocabularies import CORPUS, SAMPLES, SPACE, slow_byte_level, slow_sentencepiece

from optx.checkpoint.gguf import read_gguf, write_gguf
from optx.errors import CheckpointError, RequestError
from optx.tokenizer import Tokenizer

FIELDS = ("bos_id", "eos_ids", "add_bos", "vocab_size", "chat_template", "special_tokens")


@pytest.fixture
def byte_level() -> dict[str, object]:
    return vocabularies.byte_level()


@pytest.fixture
def sentencepiece() -> dict[str, object]:
    return vocabularies.sentencepiece()


def random_texts(rng, count: int) -> list[str]:
    """Runs and mixtures of the characters where tokenizers differ."""
    alphabet = [
        *"thecasonm .,'-1",
        "  ",
        "\n",
        "\t",
        "é",
        "日",
        "本",
        "🤽",
        "\u200d",
        SPACE[:0],
        "tttt",
        "<unk>",
        "the ",
    ]
    return ["".join(rng.choice(alphabet, rng.integers(1, 30))) for _ in range(count)]


# Ids


def test_sentencepiece_ids_are_the_references(sentencepiece, rng):
    tokenizer, slow = Tokenizer.from_gguf(sentencepiece), slow_sentencepiece(sentencepiece)
    for text in [*SAMPLES, *CORPUS, *random_texts(rng, 300)]:
        want = slow(text)
        assert tokenizer.encode(text) == [1, *want], text
        assert tokenizer.encode(text, add_special=False) == want
        assert tokenizer.decode(want) == text


def test_space_prefix(sentencepiece):
    tokenizer = Tokenizer.from_gguf(sentencepiece | {"tokenizer.ggml.add_space_prefix": True})
    ids = tokenizer.encode("the cat", add_special=False)
    assert ids == slow_sentencepiece(sentencepiece)(" the cat")
    assert tokenizer.decode(ids) == "the cat" and tokenizer.decode(ids, continues=True) == " the cat"
    assert tokenizer.encode("") == [1]


# Special tokens


def test_text_is_data_unless_asked(byte_level, sentencepiece):
    tokenizer = Tokenizer.from_gguf(byte_level)
    end = byte_level["tokenizer.ggml.eos_token_id"]
    assert end not in tokenizer.encode("a<|end|>b") and tokenizer.decode(tokenizer.encode("a<|end|>b")) == "a<|end|>b"
    ids = tokenizer.encode("a<|end|>b", parse_special=True)
    assert ids[1] == end and len(ids) == 3
    assert tokenizer.decode(ids) == "ab" and tokenizer.decode(ids, skip_special=False) == "a<|end|>b"
    assert end + 1 in tokenizer.encode("a<think>b")  # user-defined: not special, found in any text
    assert end not in tokenizer.encode("<|end|>")  # the setting of the call before is gone
    spm = Tokenizer.from_gguf(sentencepiece)
    for text in ("<unk>", "</s>", "<s>", "<0x41>"):
        ids = spm.encode(text, add_special=False)
        assert min(ids) > 2 and spm.decode(ids) == text
    assert spm.encode("</s>", add_special=False, parse_special=True) == [2]


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff", b"bytes", None])
def test_what_is_no_text_is_refused(text, byte_level):
    with pytest.raises(RequestError, match=r"text: got .*allowed: (valid Unicode|str)"):
        Tokenizer.from_gguf(byte_level).encode(text)


# Back to text


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_stream_is_decoding_piece_by_piece(kind, request, rng):
    tokenizer = Tokenizer.from_gguf(request.getfixturevalue(kind))
    for text in SAMPLES + CORPUS:
        stream, ids = tokenizer.stream(), tokenizer.encode(text)
        pushed = [stream.push(i) for i in ids]
        assert not any("\ufffd" in piece for piece in pushed)
        assert "".join(pushed) == text and stream.finish() == ""
    for _ in range(200):  # any ids at all, with broken UTF-8 and ids past the vocabulary
        ids = rng.integers(0, tokenizer.vocab_size + 5, 12)
        for skip in (True, False):
            stream = tokenizer.stream(skip_special=skip)
            assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


def test_a_character_of_several_tokens_appears_once_whole(sentencepiece):
    tokenizer = Tokenizer.from_gguf(sentencepiece)
    ids = tokenizer.encode("é𝔹", add_special=False)
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids[-4:]] == ["", "", "", "𝔹"]
    assert [stream.push(i) for i in ids[-4:-1]] == ["", "", ""] and stream.finish() == "\ufffd"


def test_decode_agrees_with_the_tokenizers_library(byte_level, sentencepiece, rng):
    for metadata in (byte_level, sentencepiece, sentencepiece | {"tokenizer.ggml.add_space_prefix": True}):
        tokenizer = Tokenizer.from_gguf(metadata)
        for text in SAMPLES + CORPUS:
            ids = tokenizer.encode(text)
            for skip in (True, False):
                assert tokenizer.decode(ids, skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)
    with pytest.raises(RequestError, match="token id: got -1"):
        tokenizer.decode([-1])


# Files


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_saved_and_loaded_is_the_same(kind, request, tmp_path):
    metadata = request.getfixturevalue(kind)
    write_gguf(tmp_path / "vocab.gguf", metadata, {"w": np.zeros(1, np.float32)})
    tokenizer = Tokenizer.from_gguf(read_gguf(tmp_path / "vocab.gguf").metadata)
    (tmp_path / "generation_config.json").write_text('{"top_k": 5, "eos_token_id": 9}')
    tokenizer.save(tmp_path)
    loaded = Tokenizer.from_hf_dir(tmp_path)
    assert [getattr(loaded, name) for name in FIELDS] == [getattr(tokenizer, name) for name in FIELDS]
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_k"] == 5
    for text in SAMPLES + CORPUS:
        for special in (False, True):
            ids = tokenizer.encode(text, parse_special=special)
            assert loaded.encode(text, parse_special=special) == ids
            assert loaded.decode(ids) == tokenizer.decode(ids)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # any other reader adds the same bos
    assert other.encode("the cat").ids == tokenizer.encode("the cat")


def test_a_hugging_face_folder(byte_level, tmp_path):
    Tokenizer.from_gguf(byte_level).save(tmp_path)
    end = byte_level["tokenizer.ggml.eos_token_id"]
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": [3, 4]}')
    templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    config = {"eos_token": {"content": "<|end|>"}, "bos_token": None, "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.from_hf_dir(tmp_path)
    assert loaded.eos_ids == {end, 3, 4} and loaded.bos_id is None and not loaded.add_bos
    assert loaded.chat_template == "d" and loaded.special_tokens == {"eos_token": "<|end|>"}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    loaded = Tokenizer.from_hf_dir(tmp_path)
    assert loaded.chat_template == "jinja" and loaded.eos_ids == {end, 5}


def test_padding_and_truncation_settings_are_ignored(byte_level, tmp_path):
    tokenizer = Tokenizer.from_gguf(byte_level)
    tokenizer._backend.enable_truncation(2)
    tokenizer._backend.enable_padding(length=9)
    tokenizer.save(tmp_path)
    assert len(Tokenizer.from_hf_dir(tmp_path).encode("the cat sat, 1 2")) == 8


BAD_FILES = {
    "tokenizer.json": [
        (None, "no such file.*save_pretrained"),
        (b"{", "not a tokenizer"),
        (b"\xff\xfe", "not a tokenizer"),
        (b"[]", "not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}', "not a tokenizer"),
    ],
    "tokenizer_config.json": [(b"{", "not JSON"), (b"[1]", "got list, allowed: a JSON object"), (b"\xff", "not UTF-8")],
    "generation_config.json": [(b'{"eos_token_id": "2"}', "eos_token_id: got '2', allowed: token ids")],
    "chat_template.jinja": [(b"\xff", "not UTF-8")],
}


@pytest.mark.parametrize(("name", "data", "message"), [(n, d, m) for n, rows in BAD_FILES.items() for d, m in rows])
def test_bad_files_are_refused(name, data, message, byte_level, tmp_path):
    Tokenizer.from_gguf(byte_level).save(tmp_path)
    if data is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        Tokenizer.from_hf_dir(tmp_path)


def test_other_decoders_are_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(CheckpointError, match="decoder: got none, allowed: ByteLevel"):
        Tokenizer(backend)
    backend.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="decoder: got WordPiece"):
        Tokenizer(backend)


# Real models

GREEDY = {  # continuations by transformers 5.24 in float32
    "smollm2_path": (
        [8180, 3365, 20391, 617, 5732, 288, 1238, 281, 260, 2388, 30, 2306, 736, 1129, 685, 288, 260, 10724],
        " girl named Emma who loved to play in the sun. She would often go to the beach",
    ),
    "gemma_path": ([506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030], " the capital of the country of France. It"),
}
GPT2_ASCII = r"\d|'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s"


@functools.cache
def load(path):
    metadata = read_gguf(path).metadata
    return metadata, Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("name", GREEDY)
def test_a_real_vocabulary(name, request, tmp_path):
    metadata, tokenizer = load(request.getfixturevalue(name))
    ids, text = GREEDY[name]
    assert tokenizer.decode(ids, continues=True) == text
    first = {"smollm2_path": [504, 3575, 282, 4649, 314], "gemma_path": [2, 818, 5279, 529, 7001, 563]}[name]
    assert tokenizer.encode("The capital of France is") == first
    slow = slow_sentencepiece(metadata) if name == "gemma_path" else slow_byte_level(metadata, GPT2_ASCII)
    samples = [text for text in SAMPLES[:4] + CORPUS[:1] if text] + ["x" * 40, "-" * 33 + "=" * 9, "<unk> a   b ( ) }"]
    if name == "gemma_path":
        samples += [*SAMPLES[4:], CORPUS[1], "[multimodal]<b>b</b>\t\t\t12 34"]
    for sample in samples:
        want = slow(sample)
        assert tokenizer.encode(sample, add_special=False) == want, sample
        assert tokenizer.decode(want) == sample
    tokenizer.save(tmp_path)
    loaded = Tokenizer.from_hf_dir(tmp_path)
    assert [getattr(loaded, name) for name in FIELDS] == [getattr(tokenizer, name) for name in FIELDS]
    assert all(loaded.encode(sample) == tokenizer.encode(sample) for sample in samples)


@pytest.mark.parametrize(("name", "count"), [("smollm2_path", 312_144), ("gemma_path", 310_432)])
def test_wikitext_survives(name, count, request, wikitext):
    _, tokenizer = load(request.getfixturevalue(name))
    text = wikitext.read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    assert len(ids) == count  # Gemma's are those of the SentencePiece library and a bos
    assert tokenizer.decode(ids) == text
