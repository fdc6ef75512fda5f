"""Bounds on a target: times, what fits, energy, price, several devices, speculation."""

import dataclasses
import json

import pytest

import optx
from optx import cli, ir
from optx.configs import model_path
from optx.cost_mesh import Collective, Mesh, cache_parts, collectives, parts_of, split
from optx.errors import UsageError
from optx.estimate import accepted, by_layer, by_op, estimate, speculation_gain
from optx.target import TARGETS, Peak, Price, Target

H100 = TARGETS["h100"]
CONTEXT = 40_960


@pytest.fixture(scope="module")
def dense():
    return optx.load_config(model_path("qwen3-8b")).tree


@pytest.fixture(scope="module")
def running(dense):
    return estimate(dense, H100, batch=1, context=CONTEXT)


@pytest.fixture(scope="module")
def mixture():
    return optx.load_config(model_path("qwen3-30b-a3b")).tree


def test_times_of_the_running_example(running):
    assert 1e3 * running.tpot == pytest.approx(6.321, abs=1e-3)
    assert running.tokens_per_second == pytest.approx(158.2, abs=0.05)
    assert running.ttft == pytest.approx(1.0756, abs=1e-4)  # 1,064 TFLOP at 989.4 TFLOP/s
    assert running.decode.binds == "memory" and running.prefill.binds == "compute"
    assert running.decode.intensity == pytest.approx(1.856, abs=1e-3)
    assert running.ridge == pytest.approx(989.4 / 3.35)


def test_what_fits(dense, running):
    """(80 GB - 16.38 GB) / 6.04 GB a sequence; / 147,456 B a token."""
    room = 80 * 10**9 - ir.weight_bytes(dense)
    assert running.largest_batch == room // (147_456 * CONTEXT) == 10
    assert running.largest_context == room // 147_456 == 431_440
    assert running.held == ir.weight_bytes(dense) + 147_456 * CONTEXT
    small = dataclasses.replace(H100, memory=16 * 10**9)
    none = estimate(dense, small, context=CONTEXT)
    assert (none.largest_batch, none.largest_context) == (0, 0)


def test_a_cache_that_does_not_grow_fits_any_context():
    states = optx.load_config(model_path("mamba2-2.7b")).tree
    found = estimate(states, H100, batch=1, context=1000)
    assert found.largest_context is None
    assert found.largest_batch == (80 * 10**9 - ir.weight_bytes(states)) // 169_836_544


def test_copy_or_compute_again(running):
    """6.04 GB of KV: 1.8 ms out of memory, 13 ms over NVLink, 96 ms over PCIe, 121 ms from another host, 431 ms from a drive;
    1.08 s again."""
    milliseconds = [1e3 * rung.seconds for rung in running.kv_rungs]
    assert milliseconds == [pytest.approx(x, rel=1e-3) for x in (1.803, 13.42, 95.87, 120.8, 431.4, 1075.6)]
    assert [rung.name for rung in running.kv_rungs][-1] == "computed again"
    assert milliseconds == sorted(milliseconds)


def test_energy_and_price(running):
    assert running.joules_per_token == pytest.approx(running.decode.bytes * 31.36e-12)
    assert running.dollars_per_million == pytest.approx(1e6 * 3.78 / 3600 * running.tpot)
    priced = dataclasses.replace(H100, price=Price(dollars=26_280, per="device"))
    assert priced.price.hourly == 1


def test_large_batches_are_bound_by_compute(dense):
    wall = H100.peak.bf16 / H100.bandwidth  # operations a byte; a weight of 2 bytes meets 2 a token
    for batch, binds in ((int(0.9 * wall), "memory"), (int(1.1 * wall), "compute")):
        step = estimate(dense, H100, batch=batch, context=1).decode
        assert step.binds == binds
        floor = max(step.bytes / H100.bandwidth, step.flops / H100.peak.bf16)
        assert floor <= step.seconds <= step.bytes / H100.bandwidth + step.flops / H100.peak.bf16


def test_sums_by_op_and_by_layer(running):
    for groups in (by_op(running.decode), by_layer(running.decode)):
        assert sum(group["bytes"] for group in groups) == running.decode.bytes
        assert sum(group["flops"] for group in groups) == running.decode.flops
        assert sum(group["seconds"] for group in groups) == pytest.approx(running.tpot)
        assert sum(group["sites"] for group in groups) == len(running.decode.ops)
    assert [group["op"] for group in by_op(running.decode)] == ["matmul", "attention", "head", "vectors"]


@pytest.mark.parametrize(
    "missing, none",
    [
        ({"bandwidth": None}, {"tpot", "tokens_per_second", "ridge", "dollars_per_million", "ttft"}),
        ({"peak": Peak(fp8=1e15)}, {"ttft", "ridge"}),
        ({"memory": None}, {"largest_batch", "largest_context"}),
        ({"energy": None}, {"joules_per_token"}),
        ({"price": None}, {"dollars_per_million"}),
    ],
)
def test_a_figure_that_is_not_known_leaves_out_what_needs_it(dense, missing, none):
    figures = ("tpot", "tokens_per_second", "ttft", "ridge", "largest_batch", "largest_context", "joules_per_token",
               "dollars_per_million")  # fmt: skip
    found = estimate(dense, dataclasses.replace(H100, **missing), context=100)
    assert {name for name in figures if getattr(found, name) is None} == none


def test_the_bare_minimum_of_a_target(dense):
    found = estimate(dense, Target(name="x", platform="gpu", arch="any"), context=100)
    assert found.tpot is None and found.decode.binds is None
    assert json.loads(json.dumps(found.to_dict()))["tpot_seconds"] is None


# --- several devices ---------------------------------------------------------------------------------------------------


def test_a_parameter_falls_by_one_axis_of_each_kind():
    mesh = Mesh(tensor=4, expert=2)
    assert split(("embed", "heads"), (64, 32), mesh) == 4
    assert split(("embed", "heads"), (64, 30), mesh) == 1, "30 does not divide"
    assert split(("experts", "embed", "mlp"), (8, 64, 32), mesh) == 8
    assert split(("inner", "mlp"), (64, 64), mesh) == 4, "once"
    assert split(None, (64,), mesh) == 1


def test_a_dense_model_on_eight_devices(dense, running):
    found = estimate(dense, H100, batch=1, context=CONTEXT, mesh=Mesh(tensor=8))
    norms = sum(2 * v.get_value().size for v in ir.params(dense).values() if len(v.get_value().shape) == 1)
    whole = ir.weight_bytes(dense)
    assert found.held == pytest.approx((whole - norms + 147_456 * CONTEXT) / 8 + norms)
    assert found.decode.flops == pytest.approx(running.decode.flops / 8)
    sent = [exchange.sent for exchange in found.decode.exchanges]
    assert sent == [2 * 7 / 8 * 4096 * 2] * 72 + [7 / 8 * 151_936 * 4]
    assert found.tpot == pytest.approx(found.decode.bytes / 3.35e12 + sum(sent) / 450e9)
    assert running.tpot / 8 < found.tpot < running.tpot / 7
    assert found.dollars_per_million == pytest.approx(8e6 * 3.78 / 3600 * found.tpot)


def test_kv_heads_bound_how_far_a_cache_is_split(dense):
    spec = dense.layers[0].mixer.cache  # 8 heads
    assert [cache_parts(spec, Mesh(tensor=n)) for n in (1, 4, 8, 16)] == [1, 4, 8, 8]
    latent = optx.load_config(model_path("deepseek-v3")).tree.layers[0].mixer.cache
    assert cache_parts(latent, Mesh(tensor=8)) == 1
    state = optx.load_config(model_path("mamba2-2.7b")).tree.layers[0].mixer.cache  # 80 heads, 5,376 channels
    assert cache_parts(state, Mesh(tensor=16)) == 16


def test_experts_over_groups(mixture):
    """128 experts over 4 groups of 2: each group has its own sequences, and its experts get tokens of all."""
    mesh = Mesh(tensor=2, expert=4)
    parts = parts_of(mixture, mesh)
    assert parts["layers/0/mlp/experts/down"] == 8 and parts["layers/0/mixer/q"] == 2
    found, alone = (estimate(mixture, H100, batch=8, context=100, mesh=m) for m in (mesh, Mesh()))
    bytes_of = {group["op"]: group["bytes"] for group in by_op(found.decode)}
    before = {group["op"]: group["bytes"] for group in by_op(alone.decode)}
    assert bytes_of["experts"] == pytest.approx(before["experts"] / 8)
    assert bytes_of["attention"] == pytest.approx(before["attention"] / 8)
    assert bytes_of["head"] == pytest.approx(before["head"] / 2)
    exchanges = collectives(mixture, mesh, tokens=2, rows=2)
    kinds = [exchange.kind for exchange in exchanges if exchange.path == "layers/0/mlp"]
    assert kinds == ["all_reduce", "all_to_all", "all_to_all"]
    there = next(exchange for exchange in exchanges if exchange.kind == "all_to_all")
    assert there.sent == 2 / 2 * 8 * 3 / 4 * 2048 * 2


def test_an_exchange_takes_one_way_of_the_link():
    assert Collective(path="", kind="all_reduce", sent=900e9).seconds(900e9) == 2
    assert Collective(path="", kind="all_reduce", sent=1).seconds(None) is None


@pytest.mark.parametrize(
    "name, mesh, told",
    [
        ("qwen3-30b-a3b", {"expert": 9}, "9 groups of experts; the model has 128 experts; allowed: a divisor, or 1"),
        ("qwen3-8b", {"expert": 2}, "2 groups of experts; the model has no experts"),
        ("qwen3-8b", {"tensor": 10_007}, "tensor 10007 divides no heads or widths"),
    ],
)
def test_a_mesh_that_does_not_divide(name, mesh, told):
    with pytest.raises(UsageError, match=told):
        estimate(optx.load_config(model_path(name)).tree, H100, mesh=Mesh(**mesh))


def test_a_mesh_has_devices():
    with pytest.raises(UsageError, match="mesh: tensor 0, expert 1; allowed: at least 1 each"):
        Mesh(tensor=0)
    assert Mesh(tensor=2, expert=3).devices == 6
    assert [str(Mesh()), str(Mesh(tensor=2, expert=3))] == ["one device", "2 x tensor, 3 x expert"]


# --- speculation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, tokens", [(0.6, 2.31), (0.8, 3.36), (0.9, 4.10), (0.0, 1), (1.0, 5)])
def test_tokens_of_a_verification(rate, tokens):
    assert accepted(rate, 4) == pytest.approx(tokens, abs=0.005)


def test_speculation_gains_or_loses():
    assert speculation_gain(0.8, 4, 0.05) == pytest.approx(3.3616 / 1.2)
    assert speculation_gain(0.3, 4, 0.2) < 1, "drafts that are refused cost more than they bring"
    assert speculation_gain(0.8, 4, 0.05, verify_cost=5) < 1, "a batch bound by compute pays for every draft"


# --- plan --------------------------------------------------------------------------------------------------------------


def test_plan_prints_the_bounds(capsys):
    assert cli.run(["plan", "qwen3-8b", "--target", "h100"]) == 0
    text = capsys.readouterr().out
    assert "time a step: at least 6.32 ms on h100" in text
    assert "not in it: the input embedding, of which a step reads single rows; counted, 22.4 GB and 6.69 ms" in text
    assert "decode: at most 158.19 tokens/s, TPOT 6.321 ms; memory binds (1.86 FLOP/B, ridge at 295)" in text
    assert "prefill of 40,960 tokens: 1,064 TFLOP (494.8 of attention), TTFT at least 1,076 ms" in text
    assert "memory holds at most: 10 sequences of 40,960 tokens; 431,440 tokens in each of 1" in text
    assert "13.42 ms from another device, 95.87 ms from host memory" in text and "1,076 ms computed again" in text
    assert "a decoded token takes at least: 0.664 J of memory; $6.64 a million" in text


def test_plan_of_a_mesh(capsys):
    arguments = ["plan", "qwen3-30b-a3b", "--target", "h100", "--batch", "8", "--context", "1000"]
    assert cli.run([*arguments, "--tensor", "2", "--expert", "4"]) == 0
    text = capsys.readouterr().out
    assert "the result on 8 h100 (2 x tensor, 4 x expert), a decode step op by op: the share of one device" in text
    assert "memory a device: 8.9 GB of 80.0 GB" in text and "does not fit" not in text
    assert "time a step: at least" not in text, "of one device, which has not the whole model"
    assert cli.run([*arguments, "--expert", "5"]) == 2
    assert "mesh: 5 groups of experts; the model has 128 experts" in capsys.readouterr().err


def test_plan_as_json(capsys):
    assert cli.run(["plan", "qwen3-8b", "--recipe", "int4_kv8", "--target", "h100", "--batch", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    found = plan["estimate"]
    assert found["tokens_per_second"] == pytest.approx(4 / found["tpot_seconds"])
    assert found["tpot_seconds"] == pytest.approx(plan["step_seconds_at_least"], rel=1e-3)
    assert {group["format"] for group in found["by_op"]} == {"int4_g64", "int8", "bfloat16"}
    assert len(found["by_layer"]) == 37
    assert {figure for source in found["sources"] for figure in source["figures"]} >= {"memory", "bandwidth", "peak"}
    assert plan["before"]["embedding"] == 151_936 * 4096 * 2


def test_plan_on_a_machine_without_figures(capsys):
    assert cli.run(["plan", "smollm3-3b", "--target", "cpu", "--context", "100"]) == 0
    text = capsys.readouterr().out
    assert "prefill of 100 tokens: 0.5645 TFLOP (0.001489 of attention)" in text
    assert "TPOT" not in text and "memory holds" not in text
