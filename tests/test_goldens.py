"""Every family against transformers: tiny random checkpoints that it saved, with its logits and greedy continuations.

tests/goldens/make.py made them; each folder is an HF checkpoint, its request.json says what is on.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import optx
from optx import ir
from optx.bench.timing import relative_error
from optx.engine.engine import Engine, EngineOptions
from optx.errors import ConfigError

FOLDER = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/answers.npz"))


@functools.cache
def golden(name):
    """(compiled model, answers, request)."""
    folder = FOLDER / name
    model = optx.compile(optx.load(str(folder), dtype="float32"))
    return model, np.load(folder / "answers.npz"), json.loads((folder / "request.json").read_text())


@functools.cache
def engine(name, mixed: bool) -> Engine:
    """Chunks of 5 tokens, pages of 4: nothing divides anything. mixed: chunks beside decodes, three decodes a dispatch."""
    options = EngineOptions(context=64, page_size=4, rows=3, chunks=(5,), mixed=mixed, ticks=3 if mixed else 1)
    return Engine(golden(name)[0].program, options)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    model, answers, request = golden(name)
    found = model.logits(answers["tokens"])
    assert relative_error(found, answers["logits"]) < request.get("tolerance", 1e-4)


# Every kind of mixer and of router once; the others differ in numbers.
MIXED = ("gemma3", "gpt_oss", "deepseek_v3", "deepseek_v32", "qwen3_next", "jamba", "nemotron_h", "minimax")


@pytest.mark.parametrize("name, mixed", [*((n, False) for n in NAMES), *((n, True) for n in MIXED)])
def test_greedy_through_the_engine(name, mixed):
    """Prefill in odd chunks and decode one by one, the rows together and each alone, give the full forward's tokens."""
    _, answers, _ = golden(name)
    prompts = [row[: answers["tokens"].shape[1] // 2].tolist() for row in answers["tokens"]]
    together = generate(name, prompts, mixed)
    assert together == answers["greedy"].tolist()
    assert [generate(name, [prompt], mixed)[0] for prompt in prompts] == together


def generate(name, prompts, mixed):
    sampling = optx.Sampling(max_tokens=golden(name)[1]["greedy"].shape[1])
    requests = [engine(name, mixed).add_request(prompt, sampling) for prompt in prompts]
    engine(name, mixed).run()
    engine(name, mixed).check()
    return [request.output for request in requests]


@pytest.mark.parametrize("name", NAMES)
def test_description(name):
    path = FOLDER / name / "describe.txt"
    assert path.read_text() == description(name), f"run `python tests/test_goldens.py {name}` if it should be so"


def description(name) -> str:
    return ir.describe(optx.load(str(FOLDER / name), dtype="float32").tree) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_field_is_named(name, tmp_path):
    config = json.loads((FOLDER / name / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "invented_field": 1}))
    with pytest.raises(ConfigError, match="invented_field"):
        optx.load_config(path)


@pytest.mark.parametrize("name", NAMES)
def test_hf_export_comes_back(name, tmp_path):
    model, answers, _ = golden(name)
    optx.export(model, tmp_path / "out", format="hf")
    again = optx.compile(optx.load(str(tmp_path / "out"), dtype="float32"))
    np.testing.assert_array_equal(again.logits(answers["tokens"]), model.logits(answers["tokens"]))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        (FOLDER / name / "describe.txt").write_text(description(name))
