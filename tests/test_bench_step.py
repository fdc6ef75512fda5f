"""A decode step of a shape with random weights: bytes as planned, experts as many as the batch takes."""

import json

import jax
import numpy as np
import pytest

import optx
from optx import cli, cost, ir
from optx.bench import step
from optx.cache import CacheSpec, Stream
from optx.errors import UsageError
from optx.nn import Experts, MoE, Router
from optx.recipe import Recipe

MOE = {
    "model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 8,
    "num_experts_per_tok": 2, "mlp_only_layers": [1], "vocab_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = 8 * 3 * 32 * 24 * 4  # bytes of one layer's


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(MOE))
    return path


@pytest.mark.parametrize("batch, distinct", [(1, 2), (2, 3.5), (4, 5.46875), (400, 8)])
def test_bytes_count_the_experts_that_a_batch_takes(config, batch, distinct):
    """8 (1 - (3/4)^B) of 8 experts, 2 a token; a batch of one reads its two."""
    planned = optx.plan(optx.load_config(config))
    tree = planned.tree
    others = ir.weight_bytes(tree) - ir.weight_bytes(tree.embed) - EXPERTS
    read = planned.bytes_per_token(batch, 10)["weights"]
    assert read == pytest.approx(others + EXPERTS * distinct / 8, abs=1)
    assert planned.steps(batch, 10)[-1].held > read - 1, "memory holds all of them"
    assert planned.to_dict(batch, 10)["after"]["weights_read"] == read


def test_the_expected_number_is_what_uniform_routing_gives():
    rng = np.random.default_rng(0)
    draws = [len({e for _ in range(6) for e in rng.choice(32, 4, replace=False)}) for _ in range(2000)]
    moe = MoE(Router(8, 32, top_k=4), Experts(32, 8, 8))
    shared = ir.weight_bytes(moe) - ir.weight_bytes(moe.experts)
    expected = (ir.active_bytes(moe, 6) - shared) / ir.weight_bytes(moe.experts) * 32
    assert np.mean(draws) == pytest.approx(expected, rel=0.01)


def test_a_quantized_expert_counts_as_it_is_stored(config):
    recipe = Recipe(weights=[optx.passes.quantize_weights.QuantizeWeights(match=".*experts.*", format="int8")])
    tree = optx.plan(optx.load_config(config), recipe).tree
    stored = ir.weight_bytes(tree.layers[0].mlp.experts)
    assert stored < EXPERTS / 3
    rest = ir.weight_bytes(tree) - ir.weight_bytes(tree.embed) - stored
    assert cost.weights_read(tree, 1) == pytest.approx(rest + stored / 4, abs=1)


def test_an_unrouted_model_reads_everything_but_its_embedding():
    tree = optx.load_config(step.model_path("qwen3-8b")).tree
    assert cost.weights_read(tree, 7) == ir.weight_bytes(tree) - ir.weight_bytes(tree.embed)


def test_decode_of_a_tiny_shape(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step.timing, "read_ceiling", lambda: 1e10)
    out = tmp_path / "out.json"
    arguments = ["--shape", str(config), "--batch", "1", "--batch", "3", "--context", "20", "--out", str(out)]
    assert cli.run(["bench", "decode", *arguments]) == 0
    shown, data = capsys.readouterr().out, json.loads(out.read_text())
    assert "x bound" in shown and data["read_bytes_per_second"] == 1e10
    planned = optx.plan(optx.load_config(config))
    for found, batch in zip(data["steps"], (1, 3), strict=True):
        want = planned.bytes_per_token(batch, 20)
        assert (found["model"], found["batch"], found["context"]) == ("tiny", batch, 20)
        assert (found["weight_bytes"], found["cache_bytes"]) == (want["weights"], want["kv"])
        assert found["bound_milliseconds"] == pytest.approx(sum(want.values()) / 1e7)
        assert found["times_bound"] == pytest.approx(found["milliseconds"] / found["bound_milliseconds"])
    assert cli.run(["bench", "decode", *arguments[:4], "--context", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["batch"] == 1


def test_rows_of_the_step_take_different_experts(config):
    """Equal tokens would read the experts of one."""
    planned = optx.plan(optx.load_config(config))
    program = optx.lower.Program.of(optx.lower.lower(step.random_weights(planned.tree), planned.target))
    stepper = step.Stepper(program, [step.Layout(pages=8, page_size=64, slots=8)], 8)
    assert len(set(step.ticks(stepper, [], 8, 20).tokens.tolist())) > 4


@pytest.mark.parametrize("name", step.SHAPES)
def test_shapes_of_the_bench_fit_one_card(name):
    tree = step.source(name).tree
    held = cost.step_bytes(tree, max(step.BATCHES), step.CONTEXT).held
    assert 40e9 < held < 75e9
    assert jax.tree.leaves(ir.params(tree)["embed/table"].get_value())[0].dtype == "bfloat16"


def test_names_that_are_no_shape():
    with pytest.raises(UsageError, match="shape 'qwen3-30b-a3': no such config.json; did you mean 'qwen3-30b-a3b'"):
        step.source("qwen3-30b-a3")


def test_flags_of_another_bench(capsys):
    assert cli.run(["bench", "kernels", "--batch", "2"]) == 2
    assert "bench kernels: --batch says nothing here; allowed: op" in capsys.readouterr().err


@pytest.mark.parametrize("context", [5, 32, 61])
def test_rows_are_those_of_the_engine(context):
    """Windows list the pages that a query may see, and every slot has its position."""
    spec = CacheSpec(kind="paged", streams=(Stream(name="k", shape=(1, 8)),), window=16, sinks=2)
    for kept in (spec, spec.replace(window=None, sinks=0)):
        rows = step.rows_of(kept, 3, context, 8)
        for row in range(3):
            length = rows.lengths[0, row]
            at = rows.positions[rows.table[0, row]].reshape(-1)[:length]
            seen = [p for p in range(context) if kept.window is None or p > context - 1 - 16 or p < 2]
            assert set(seen) <= set(at) and len(set(at)) == length and at[-1] == context - 1
            assert length <= (context if kept.window is None else 16 + 2 * 8 + 8)
            assert rows.positions.reshape(-1)[rows.newest[row]] == context - 1
