"""Answers of an engine that follow a grammar: valid whatever the model, the same in any company, and those beside them too."""

import dataclasses

import families
import numpy as np
import pytest
import vocabularies
from schemas import PERSON, SCHEMAS, allowed, validate

import optx
from optx.checkpoint.gguf import read_gguf
from optx.engine.constraint import Constraint
from optx.engine.engine import Engine
from optx.engine.options import EngineOptions
from optx.engine.request import Request, Sampling
from optx.errors import RequestError
from optx.grammar import Grammar
from optx.tokenizer import Tokenizer

OPTIONS = EngineOptions(rows=3, context=96, page_size=4, chunks=(8,), ticks=4)
FREE = Sampling(max_tokens=24, temperature=1.0, seed=3, ignore_eos=True)
MODES = {
    "multi-tick": {},
    "overlap": {"overlap": True},
    "mixed": {"mixed": True, "overlap": True},
    "short of pages": {"pages": 19},
    "no prefix cache": {"prefix_cache": False},
    "speculation": {"speculate": optx.Speculation(method="ngram", tokens=3, always=True)},
}
PROMPT = families.prompt(9)


@pytest.fixture(scope="module")
def compiled():
    """One token a byte; the model has six more."""
    source = dataclasses.replace(optx.api.from_module(families.concrete("llama")), tokenizer=families.tokenizer())
    return optx.compile(source)


@pytest.fixture(scope="module")
def engine(compiled):
    return warmed(compiled)


def warmed(compiled, **changes) -> Engine:
    """For all ways of sampling the programs of the most capable one: few to compile."""
    engine = Engine(compiled.program, dataclasses.replace(OPTIONS, **changes), compiled.tokenizer.eos_ids)
    engine.warm_up(Sampling(logprobs=0))
    return engine


@pytest.fixture(scope="module")
def person(compiled) -> Sampling:
    grammar = Grammar.json_schema(PERSON, compiled.tokenizer)
    return Sampling(max_tokens=64, temperature=1.0, seed=5, grammar=grammar)


@pytest.fixture(scope="session")
def smollm2(smollm2_path) -> Tokenizer:
    return Tokenizer.from_gguf(read_gguf(smollm2_path).metadata)


def run(engine, *samplings: Sampling) -> list[Request]:
    requests = [engine.add_request(PROMPT[: 9 - i], how) for i, how in enumerate(samplings)]
    engine.run()
    engine.check()
    return requests


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_validates(name, smollm2):
    """A model that knows nothing, whose vocabulary is padded, at temperature 1: what it writes is valid all the same."""
    model = families.concrete("llama", vocab_size=smollm2.vocab_size + 64, max_position_embeddings=512)
    engine = Engine(
        optx.compile(model).program, EngineOptions(rows=3, context=512, page_size=16, chunks=(8,)), smollm2.eos_ids
    )
    grammar = Grammar.json_schema(SCHEMAS[name], smollm2)
    how = Sampling(max_tokens=400, temperature=1.0, grammar=grammar)
    changes = [{}, {"top_p": 0.9}, {"frequency_penalty": 1.0, "logprobs": 2}, {"top_k": 40}, {"min_p": 0.1}]
    requests = run(engine, *(dataclasses.replace(how, seed=seed, **more) for seed, more in enumerate(changes)))
    for request in requests:
        assert request.finish == "stop"
        validate(smollm2.decode(request.output), SCHEMAS[name])


@pytest.mark.parametrize("mode", MODES)
def test_answers_do_not_depend_on_the_company(mode, compiled, engine, person):
    """With a grammar and without: token for token what each gives alone, preempted and computed again too."""
    each = [
        person,
        FREE,
        dataclasses.replace(person, seed=6, logprobs=1),
        dataclasses.replace(FREE, temperature=0.0),
        dataclasses.replace(person, temperature=0.0, repetition_penalty=1.5),
        dataclasses.replace(FREE, presence_penalty=1.0),
    ]
    alone = []
    for i, how in enumerate(each):
        alone.append(engine.add_request(PROMPT[: 9 - i], how))
        engine.run()
    crowd = warmed(compiled, **MODES[mode])
    together = run(crowd, *each)
    assert [request.output for request in together] == [request.output for request in alone]
    assert [request.finish for request in together] == ["stop", "length"] * 3
    assert (crowd.stats().preemptions > 0) == (mode == "short of pages")
    for request in together[::2]:
        validate(compiled.tokenizer.decode(request.output), PERSON)


def test_greedy_is_the_likeliest_of_the_tokens_allowed(compiled, engine, person):
    (request,) = run(engine, dataclasses.replace(person, temperature=0.0, logprobs=0))
    logits = np.asarray(compiled.logits([PROMPT + request.output])[0])[len(PROMPT) - 1 :]
    matcher = person.grammar.matcher()
    for token, row, told in zip(request.output, logits, request.logprobs):
        assert token == max(allowed(matcher.mask()), key=lambda i: row[i])
        matcher.accept(token)
        likely = row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
        np.testing.assert_allclose(told.chosen, likely, atol=1e-4)  # the model's own, masks or not
    assert matcher.done


def test_a_group_follows_its_grammar_each_on_its_own(engine, person):
    each = [dataclasses.replace(person, seed=seed) for seed in range(4)]
    group = engine.add_group(PROMPT, each)
    engine.run()
    engine.check()
    single = [engine.add_request(PROMPT, how) for how in each]
    engine.run()
    assert [request.output for request in group] == [request.output for request in single]
    assert len({tuple(request.output) for request in group}) == 4


@pytest.mark.parametrize("warm", ["logprobs", "grammar"])
def test_masks_need_no_program_of_their_own(warm, compiled, person):
    engine = Engine(compiled.program, OPTIONS, compiled.tokenizer.eos_ids)
    engine.warm_up(Sampling(), person if warm == "grammar" else Sampling(logprobs=1))
    before = engine.compiles
    run(engine, person, FREE, dataclasses.replace(person, logprobs=1), dataclasses.replace(FREE, logprobs=1))
    assert engine.compiles == before


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_where_a_text_ends(ignore_eos, compiled, engine):
    """At an end token where it might go on, without one where nothing can follow."""
    open_, closed = (Grammar.regex(text, compiled.tokenizer) for text in ("a+", "a{3}"))
    eager = Sampling(max_tokens=9, logit_bias={families.EOS: 100.0}, ignore_eos=ignore_eos)
    reluctant = dataclasses.replace(eager, logit_bias={families.EOS: -100.0})
    first, second, third = run(
        engine,
        *(dataclasses.replace(how, grammar=g) for how, g in ((eager, open_), (reluctant, open_), (eager, closed))),
    )
    (a,) = compiled.tokenizer.encode("a")
    assert (first.output, first.finish) == ([a, families.EOS], "stop")
    assert (second.output, second.finish) == ([a] * 9, "length")
    assert (third.output, third.finish) == ([a] * 3, "stop")


def test_a_grammar_that_leads_nowhere_ends_the_request(compiled, engine):
    nowhere = Grammar.lark('start: "ab" more\nmore: more "c"', compiled.tokenizer)
    stuck, free = run(engine, Sampling(grammar=nowhere), FREE)
    assert stuck.finish == "error" and compiled.tokenizer.decode(stuck.output) == "ab"
    assert stuck.error.startswith("the grammar allows no further token (")
    assert free.output == engine_alone(engine, FREE) and free.error is None
    (told,) = compiled.complete([PROMPT], Sampling(grammar=nowhere))
    assert told.finish == "error" and told.text == "ab"


def engine_alone(engine, how: Sampling) -> list[int]:
    request = engine.add_request(PROMPT[:8], how)
    engine.run()
    return request.output


def test_a_grammar_without_a_first_token(compiled, engine):
    nowhere = Sampling(grammar=Grammar.lark('start: start "a"', compiled.tokenizer))
    with pytest.raises(
        RequestError, match="sampling.grammar: the grammar allows no further token .*; change the grammar"
    ):
        engine.add_request(PROMPT, nowhere)
    with pytest.raises(RequestError, match="sampling.grammar: "):
        engine.add_group(PROMPT, [FREE, nowhere])
    assert engine.idle


def test_a_model_with_fewer_tokens_than_the_tokenizer():
    byte_level = Tokenizer.from_gguf(vocabularies.byte_level())
    (token,) = byte_level.encode("é")
    grammar = Grammar.regex("é|a", byte_level)
    assert token > 255
    assert token in allowed(grammar.matcher().mask()) and token not in allowed(Constraint(grammar, token).mask)
    with pytest.raises(RequestError, match=f"no token among the model's {byte_level.encode('a')[0]} may come next"):
        Constraint(Grammar.regex("a", byte_level), byte_level.encode("a")[0])


def test_text_in_and_json_out(compiled, person):
    (completion,) = compiled.complete(["name and age:"], person)
    validate(completion.text, PERSON)
    assert completion.finish == "stop"


def test_what_is_no_grammar_of_a_sampling():
    with pytest.raises(
        RequestError, match="sampling.grammar: got 'json'; allowed: an optx.Grammar, or None for free text"
    ):
        Sampling(grammar="json")
