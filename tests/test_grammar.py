"""Answers that follow a grammar: masks against brute force, and errors of what is no grammar."""

import itertools
import json

import families
import jax.numpy as jnp
import numpy as np
import pytest
import vocabularies
from schemas import PERSON, SCHEMAS, allowed, validate
from tokenizers import normalizers

from optx import grammar as grammars
from optx.checkpoint.gguf import read_gguf
from optx.engine.sampling import mask_tokens
from optx.errors import RequestError
from optx.grammar import Grammar
from optx.tokenizer import Tokenizer

KINDS = ("byte_level", "sentencepiece", "space_first")


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer.from_gguf(vocabularies.byte_level())


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return Tokenizer.from_gguf(vocabularies.sentencepiece())


@pytest.fixture(scope="module")
def space_first() -> Tokenizer:
    """Puts a space in front of every text that it encodes."""
    return Tokenizer.from_gguf(vocabularies.sentencepiece() | {"tokenizer.ggml.add_space_prefix": True})


@pytest.fixture(scope="module")
def normalized() -> Tokenizer:
    """Composes characters before it splits a text."""
    tokenizer = Tokenizer.from_gguf(vocabularies.byte_level())
    tokenizer._backend.normalizer = normalizers.NFC()
    return tokenizer


@pytest.fixture(scope="session")
def smollm2(smollm2_path) -> Tokenizer:
    return Tokenizer.from_gguf(read_gguf(smollm2_path).metadata)


# Masks.


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_what_brute_force_finds(kind, request, rng):
    """A token may come where the text so far and its bytes begin a text of the language; an end token where they are one."""
    tokenizer = request.getfixturevalue(kind)
    parts = ["the ", "cat", "日本", "\n", "é"]
    language = {"".join(text).encode() for n in (1, 2, 3) for text in itertools.product(parts, repeat=n)}
    begun = {text[:n] for text in language for n in range(len(text) + 1)}
    grammar = Grammar.regex(f"({'|'.join(parts)}){{1,3}}", tokenizer)
    for _ in range(4):
        matcher, text = grammar.matcher(), b""
        while not matcher.done:
            mask = matcher.mask()
            assert mask.dtype == np.uint32 and mask.shape == (-(-tokenizer.vocab_size // 32),)
            want = {
                i
                for i in range(tokenizer.vocab_size)
                if not tokenizer.is_special(i) and (word := tokenizer.token_bytes(i)) and text + word in begun
            }
            if text in language:
                want |= tokenizer.eos_ids
            after = {word[len(text)] for word in begun if word.startswith(text) and len(word) > len(text)}
            if text not in language and len(after) == 1:  # bytes are forced: only as the tokenizer itself splits them
                assert allowed(mask) == want or (allowed(mask) < want and len(allowed(mask)) == 1)
            else:
                assert allowed(mask) == want
            token = int(rng.choice(sorted(allowed(mask))))
            matcher.accept(token)
            text += b"" if token in tokenizer.eos_ids else tokenizer.token_bytes(token)
        assert text in language and not matcher.reason


def test_masks_on_the_device_are_the_bits(rng):
    mask = rng.integers(0, 2**32, (3, 3), dtype=np.uint32)
    logits = rng.standard_normal((3, 70)).astype(np.float32)
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, :70]
    np.testing.assert_array_equal(mask_tokens(jnp.asarray(logits), jnp.asarray(mask)), np.where(bits, logits, -np.inf))


def test_after_the_end_only_end_tokens_come(byte_level):
    matcher = Grammar.lark('start: "the" " " "cat"', byte_level).matcher()
    for token in byte_level.encode("the cat"):
        assert not matcher.done
        matcher.accept(token)
    assert matcher.done and allowed(matcher.mask()) == byte_level.eos_ids
    matcher.accept(*byte_level.eos_ids)
    assert matcher.done and allowed(matcher.mask()) == byte_level.eos_ids


def test_a_text_that_may_go_on_or_end(byte_level):
    matcher = Grammar.regex("a+", byte_level).matcher()
    (a,) = byte_level.encode("a")
    assert allowed(matcher.mask()) == {a}
    matcher.accept(a)
    assert allowed(matcher.mask()) == {a} | byte_level.eos_ids and not matcher.done
    matcher.accept(*byte_level.eos_ids)
    assert matcher.done


def test_without_an_end_token_a_text_ends_where_nothing_can_follow():
    tokenizer = families.tokenizer()
    tokenizer = Tokenizer(tokenizer._backend)
    matcher = Grammar.regex("ab?", tokenizer).matcher()
    for text in "ab":
        mask = matcher.mask()
        assert allowed(mask) == set(tokenizer.encode(text)) and not matcher.done
        matcher.accept(tokenizer.encode(text)[0])
    assert not matcher.mask().any() and matcher.done and not matcher.reason


@pytest.mark.parametrize("text", ["the cat", " the", "e\u0301 cafe\u0301 日本語", "\n the"])
@pytest.mark.parametrize("kind", [*KINDS, "normalized"])
def test_forced_text_comes_byte_for_byte(kind, text, request):
    """Whatever the tokenizer does to a text: a space in front, Unicode normal forms."""
    tokenizer = request.getfixturevalue(kind)
    matcher, output = Grammar.lark(f"start: {json.dumps(text, ensure_ascii=False)}", tokenizer).matcher(), b""
    while not matcher.done:
        (token,) = allowed(matcher.mask())
        matcher.accept(token)
        output += tokenizer.token_bytes(token)
    assert output.decode() == text


def test_special_tokens_are_no_text(byte_level):
    """Neither inside strings, where their text would fit, nor as a way around the grammar."""
    matcher = Grammar.regex("<.*>", byte_level).matcher()
    (end,) = byte_level.eos_ids
    assert byte_level.token_bytes(end) == b"<|end|>"
    assert end not in allowed(matcher.mask())
    matcher.accept(byte_level.encode("<")[0])
    user_defined = byte_level.encode("<think>", parse_special=True)[0]
    assert end not in allowed(matcher.mask()) and user_defined in allowed(matcher.mask())


def test_a_grammar_that_leads_nowhere_says_so(byte_level):
    matcher = Grammar.lark('start: start "a"', byte_level).matcher()
    assert not matcher.mask().any()
    assert not matcher.done and matcher.reason.startswith("the grammar allows no further token (")


def test_a_token_outside_the_mask_leaves_nothing(byte_level):
    matcher = Grammar.regex("a+", byte_level).matcher()
    matcher.accept(byte_level.encode("b")[0])
    assert not matcher.mask().any() and not matcher.done
    assert "doesn't satisfy the grammar" in matcher.reason and "\n" not in matcher.reason


def test_matchers_of_one_grammar_are_apart(byte_level):
    grammar = Grammar.regex("ab", byte_level)
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(byte_level.encode("a")[0])
    assert allowed(first.mask()) == set(byte_level.encode("b")) and allowed(second.mask()) >= set(
        byte_level.encode("a")
    )


def test_compiled_once(byte_level, sentencepiece):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    grammar = Grammar.json_schema(schema, byte_level)
    assert Grammar.json_schema(json.loads(json.dumps(schema)), byte_level) is grammar
    assert Grammar.json_schema(schema, sentencepiece) is not grammar
    assert Grammar.json_object(byte_level) is Grammar.json_object(byte_level)
    assert Grammar.regex("a", byte_level) is not Grammar.lark("start: /a/", byte_level)


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_walk_through_a_schema_validates(name, smollm2, rng):
    """Tokens drawn evenly among those allowed: the least likely texts that a model could write."""
    grammar = Grammar.json_schema(SCHEMAS[name], smollm2)
    for _ in range(8):
        matcher, output = grammar.matcher(), []
        while not matcher.done and len(output) < 2000:
            output.append(int(rng.choice(sorted(allowed(matcher.mask())))))
            matcher.accept(output[-1])
        validate(smollm2.decode(output), SCHEMAS[name])


def follows(grammar: Grammar, text: str, tokenizer: Tokenizer) -> bool:
    """Whether allowed tokens make up the text, and then an end token may come."""
    matcher, rest = grammar.matcher(), text.encode()
    while rest:
        words = {tokenizer.token_bytes(i): i for i in allowed(matcher.mask()) - tokenizer.eos_ids}
        word = max((word for word in words if rest.startswith(word)), key=len, default=None)
        if word is None:
            return False
        matcher.accept(words[word])
        rest = rest[len(word) :]
    return bool(allowed(matcher.mask()) & tokenizer.eos_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_kind_of_grammar_takes(kind, request):
    tokenizer = request.getfixturevalue(kind)
    calls = {
        "json": (Grammar.json_object(tokenizer), ['{"a": [1, {"é": null}]}', "{\n  }"], ["[1]", '{"a"}', ""]),
        "regex": (Grammar.regex("[a-z]{2}日+", tokenizer), ["ab日日"], ["ab", "a日", "ab日!"]),
        "lark": (Grammar.lark('start: "x" num\nnum: /[0-9]+/', tokenizer), ["x12"], ["x", "12"]),
        "ebnf": (Grammar.ebnf('root ::= "x" num\nnum ::= [0-9]+', tokenizer), ["x12"], ["x", "12"]),
        "spaces": (Grammar.json_object(tokenizer), ["{" + " " * 32 + "}"], ["{" + " " * 33 + "}"]),
        "ordered": (
            Grammar.json_schema(PERSON, tokenizer),
            ['{"name":"x","age":1}'],
            ['{"age":1,"name":"x"}', '{"name":"x","age": 1}', '{"name":"x","age":151}', '{"name":"123456789","age":1}'],
        ),
    }
    for name, (grammar, good, bad) in calls.items():
        assert [follows(grammar, text, tokenizer) for text in good] == [True] * len(good), name
        assert [follows(grammar, text, tokenizer) for text in bad] == [False] * len(bad), name


# Refusals.


@pytest.mark.parametrize(
    "kind, source, told",
    [
        ("json_schema", {"type": "bogus"}, "json_schema: Invalid type: bogus; the keywords that can be held to: https"),
        ("json_schema", {"not": {}}, r'json_schema: Unimplemented keys: \["not"\]; the keywords'),
        ("json_schema", {"enum": []}, "json_schema: Unsatisfiable schema"),
        (
            "json_schema",
            {"$ref": "https://example.com/x"},
            "json_schema: Resource 'https://example.com/x' is not present",
        ),
        ("json_schema", {"type": "string", "pattern": "("}, "json_schema: regex parse error: .* unclosed group; "),
        ("json_schema", [], "json_schema: got list; allowed: an object"),
        ("json_schema", "{}", "json_schema: got str; allowed: an object"),
        ("json_schema", {"minimum": float("nan")}, "json_schema: .* allowed: what JSON can hold"),
        ("json_schema", {"enum": [{1, 2}]}, "json_schema: Object of type set is not JSON serializable"),
        ("regex", "a(b", "regex: .* unclosed group .*; allowed: the syntax of Rust's regex crate without look-around"),
        ("regex", "a(?=b)", "regex: .* look-around, .* is not supported"),
        ("regex", "", "regex: got ''; allowed: text, not empty"),
        ("regex", 5, "regex: got 5; allowed: text, not empty"),
        ("lark", "start: word", 'lark: .* unknown name: "word"'),
        ("lark", "hello", "lark: .* Expected token ':'"),
        ("ebnf", "root ::= (", r"ebnf: Expected '\)' at line 1"),
        ("ebnf", 'x ::= "a"', "ebnf: No 'root' rule found"),
    ],
    ids=str,
)
def test_what_is_no_grammar(kind, source, told, byte_level):
    with pytest.raises(RequestError, match=told) as error:
        getattr(Grammar, kind)(source, byte_level)
    assert "\n" not in str(error.value)


def test_a_schema_nested_without_end(byte_level):
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="json_schema: .*(nested too deeply|recursion)"):
        Grammar.json_schema(schema, byte_level)


def test_without_the_library(monkeypatch, byte_level):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    grammars._compile.cache_clear()
    with pytest.raises(RequestError, match=r"need llguidance: pip install 'optx\[serve\]'"):
        Grammar.json_object(byte_level)
