"""Evaluation through the paged caches: the forward's figures while nothing is thrown away, the engine's answers when it is."""

import dataclasses
import json

import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import cli
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.errors import RequestError
from optx.evaluate_paged import PagedForward
from optx.passes.evict_kv import EvictKV
from optx.passes.quantize_kv import QuantizeKV
from optx.recipe import Recipe

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind; it sleeps on. " * 3
SMALL = {
    "streaming_llm": EvictKV(policy="streaming_llm", budget=8, sinks=2, slack=4),
    "h2o": EvictKV(policy="h2o", budget=8, slack=4),
    "tova": EvictKV(policy="tova", budget=8, slack=4),
    "snapkv": EvictKV(policy="snapkv", ratio=0.5, recent=2),
    "kvzip": EvictKV(policy="kvzip", ratio=0.5, sinks=1, recent=1, part=6, instruction=""),
}
SIZES = {"chunk": 8, "page_size": 4}


@pytest.fixture(scope="module")
def served():
    """The compiled tiny model with a tokenizer, by its recipe's rules."""
    made = {}

    def get(*cache):
        if cache not in made:
            source = optx.api.from_module(families.concrete("qwen3", num_hidden_layers=1))
            source = dataclasses.replace(source, tokenizer=families.tokenizer())
            made[cache] = optx.compile(source, Recipe(cache=cache))
        return made[cache]

    return get


def test_without_eviction_the_figures_are_those_of_the_forward(served):
    want = served().evaluate(TEXT, context=24, stride=20)
    got = served().evaluate(TEXT, paged=True, context=24, stride=20, against=served(), **SIZES)
    assert got.perplexity == pytest.approx(want.perplexity, rel=1e-5)
    assert (got.tokens, got.windows) == (want.tokens, want.windows)
    assert got.bits_per_byte == pytest.approx(want.bits_per_byte, rel=1e-5)
    assert abs(got.kl) < 1e-5 and got.top1 == 1
    assert got.pages == (6,) and got.whole_pages == 6


def test_packed_pages_cost_what_they_cost_in_the_forward(served):
    """There, keys are rounded as they are stored."""
    packed = served(QuantizeKV(format="int4"))
    want = packed.evaluate(TEXT, context=24, against=served())
    got = packed.evaluate(TEXT, paged=True, context=24, against=served(), **SIZES)
    assert got.kl == pytest.approx(want.kl, rel=1e-3) and got.kl > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_it_is_what_the_engine_computes(name, served):
    """The engine's greedy answer is the argmax of the logits of prompt and answer, fed in chunks."""
    model, prompt = served(SMALL[name]), families.prompt(21, seed=3)
    options = EngineOptions(rows=1, context=48, page_size=4, chunks=(4, 8))
    engine = Engine(model.program, options)
    request = engine.add_request(prompt, Sampling(max_tokens=12))
    engine.run()
    row = PagedForward(model.program, context=33, **SIZES)
    chosen = np.full(33, -1)
    for start, logits in row.run(prompt + request.output, len(prompt)):
        chosen[start : start + len(logits)] = jnp.argmax(logits, axis=-1)
    assert chosen[20:32].tolist() == request.output


def test_a_stream_without_end_holds_its_budget(served):
    """Longer than the model's context of 128; 12 slots are 3 pages."""
    got = served(SMALL["streaming_llm"]).evaluate(TEXT, paged=True, context=200, points=4, **SIZES)
    assert got.pages == (3,) and got.whole_pages == 50
    assert [tokens for tokens, _ in got.curve] == [50, 100, 150, 200]
    assert np.exp(np.mean(np.log([value for _, value in got.curve]))) == pytest.approx(got.perplexity, rel=0.02)


def test_only_tokens_behind_the_prompt_are_scored(served):
    got = served(SMALL["snapkv"]).evaluate(TEXT, paged=True, context=40, prompt=30, max_windows=2, **SIZES)
    assert got.tokens == 20 and got.pages == (8,), "the prompt of 30 tokens before it is compacted to 15"


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "snapkv",
            {},
            "prompt None of windows of 24 tokens; allowed: 1 to 23, where snapkv 0.5 of the prompt compacts it",
        ),
        ("h2o", {"prompt": 24}, "prompt 24 of windows of 24 tokens; allowed: 1 to 23"),
        ("h2o", {"context": 200}, "context 200; allowed: 2 to the model's 128"),
        ("h2o", {"context": 24, "stride": 10, "prompt": 20}, "a window has no more than the 20 tokens of a prompt"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(name, options, message, served):
    with pytest.raises(RequestError, match=message):
        served(SMALL[name]).evaluate(TEXT, paged=True, **{"context": 24} | options, **SIZES)


def test_the_command_line(tmp_path, capsys):
    folder, _ = families.hf_dir(tmp_path / "model", "qwen3", add_bos=False, num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = tmp_path / "small.yaml"
    recipe.write_text("name: small\ncache:\n  - {pass: evict_kv, policy: h2o, budget: 64, slack: 8}\n")
    flags = ["--recipe", str(recipe), "--text", str(tmp_path / "text.txt"), "--context", "128", "--paged"]
    assert cli.run(["eval", str(folder), *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["pages"] == [2] and said["whole_pages"] == 2 and said["tokens"] == 2 * 127
    assert cli.run(["eval", str(folder), *flags[:-1], "--prompt", "8"]) != 0
    assert "add --paged" in capsys.readouterr().err
