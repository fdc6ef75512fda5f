"""Real checkpoints against transformers: greedy continuations token for token, perplexity, packed weights in memory."""

import functools
import json
from pathlib import Path

import pytest

import optx

# transformers 5.24, float32, on the same files' dequantized weights.
CONTINUATIONS = {
    "smollm2": {
        "The capital of France is": [
            7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33, 34,
            42, 37, 35, 30, 2,
        ],
        "Once upon a time, there was a little": [
            8180, 3365, 20391, 617, 5732, 288, 1238, 281, 260, 2388, 30, 2306, 736, 1129, 685, 288, 260, 10724, 284, 1238,
            351, 874, 2428, 30, 1963, 1194, 28, 1041, 4041, 288, 685, 288, 260, 10724, 284, 1238, 351, 874, 2428, 30,
        ],
    },
    "gemma3": {
        "The capital of France is": [
            506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488, 3207, 528, 7001, 532, 506, 1855, 7488,
            3207, 528, 3879, 236761, 1030, 563, 5628, 528, 506, 6029, 529, 506, 2891, 532, 563, 506, 5279, 529, 506, 4128,
            529,
        ],
        "Once upon a time, there was a little": [
            3953, 7489, 60708, 236761, 2625, 691, 496, 1401, 6538, 3953, 236764, 532, 1304, 9312, 531, 1441, 607, 1116,
            4690, 236761, 3656, 1719, 236764, 60708, 691, 5662, 607, 1116, 4690, 236764, 532, 1304, 691, 1401, 9775, 531,
            1441, 607, 1116, 861,
        ],
    },
}  # fmt: skip
KEPT = Path(__file__).parent.parent / "examples" / "wikitext_perplexity.json"


@functools.cache
def compiled(path: Path, weights: str) -> optx.Compiled:
    return optx.compile(optx.load(path, weights=weights, dtype="float32"))


@pytest.fixture(params=["smollm2", "gemma3"])
def model(request) -> tuple[str, Path]:
    fixture = {"smollm2": "smollm2_path", "gemma3": "gemma_path"}[request.param]
    return request.param, request.getfixturevalue(fixture)


def test_greedy_continuations_equal_transformers(model):
    name, path = model
    prompts, expected = zip(*CONTINUATIONS[name].items(), strict=True)
    answers = compiled(path, "dense").complete(prompts, optx.Sampling(max_tokens=40))
    assert [list(answer.token_ids) for answer in answers] == list(expected)


@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_perplexity_of_five_windows_equals_the_kept_run(model, weights, wikitext):
    """The kept run's 100 windows agree with transformers (the next test); its first five are checked here."""
    name, path = model
    kept = {(r["model"], r["weights"]): r for r in json.loads(KEPT.read_text())}[name, weights]
    got = compiled(path, weights).evaluate(wikitext.read_text(encoding="utf-8"), max_windows=5)
    assert got.windows == 5
    assert got.perplexity == pytest.approx(kept["perplexity_5_windows"], rel=1e-4)


@pytest.mark.parametrize("result", json.loads(KEPT.read_text()), ids=lambda r: f"{r['model']}-{r['weights']}")
def test_the_kept_run_agrees_with_transformers(result):
    assert result["windows"] == 100
    assert result["perplexity"] == pytest.approx(result["transformers"], rel=2e-3)
    if result["weights"] == "packed":
        assert result["share_of_file"] <= 1.1


def test_packed_weights_stay_as_small_as_the_file(model):
    _, path = model
    assert compiled(path, "packed").report.weight_bytes <= 1.1 * path.stat().st_size
