"""Predicted against measured: the model's numbers, kernels to ops, figures out of measurements, the command."""

import dataclasses
import json

import pytest
import yaml

import optx
from optx import cli, ir, lower, measured, predict, target
from optx.bench import against, fit, profile, step
from optx.cost import OpCost, step_ops
from optx.errors import LoweringError, RequestError
from optx.estimate import estimate
from optx.recipe import Recipe
from optx.target import TARGETS, Decode, Efficiency, Peak, Target

H100 = TARGETS["h100"]
MADE = Target(
    name="made",
    platform="gpu",
    arch="sm90",
    bandwidth=1e12,
    peak=Peak(bf16=1e14),
    decode=Decode(
        launch=4e-6,
        small=2e-6,
        between=50e-6,
        efficiency=(
            ("matmul/bfloat16", Efficiency(memory=0.8, compute=2.0)),
            ("matmul/int4", Efficiency(memory=0.5)),
            ("head/bfloat16", Efficiency(memory=0.9, compute=1.5)),
            ("attention/int8", Efficiency(memory=0.7)),
        ),
    ),
)
TINY = {
    "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 256,
}  # fmt: skip

# Kernels of a layer of Qwen3-8B in order, with their mean over the layers in microseconds, then the head and all others, in
# decode steps of 896 tokens a sequence; and the step's milliseconds by the host's clock. One H100 80GB HBM3, jax 0.11.2.
LAYER = (
    *("add_norm", "quant_matmul", "rotate_append", "paged_decode", "paged_decode_merge", "quant_matmul", "add_norm"),
    *("quant_matmul", "gated_act", "quant_matmul"),
)
BF16, FP8 = "fused", "fp8"
STEPS = {
    (BF16, 1): ((1.89, 18.91, 1.56, 5.75, 2.18, 13.81, 1.94, 67.39, 1.49, 35.57), 414.5, 16.7, 5.90),
    (BF16, 4): ((1.9, 18.99, 1.67, 9.59, 2.11, 13.93, 1.86, 67.79, 1.64, 35.63), 415.4, 15.9, 6.08),
    (BF16, 32): ((1.98, 19.47, 1.8, 45.98, 2.3, 14.49, 2.07, 68.8, 1.94, 37.38), 425.0, 20.7, 7.58),
    (FP8, 1): ((1.97, 11.54, 1.56, 5.73, 2.11, 9.39, 1.86, 37.18, 1.32, 20.49), 413.8, 16.8, 3.84),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's targets, apart from those of whoever runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "optx" / "targets"


@pytest.fixture(scope="module")
def trees():
    """Qwen3-8B on shapes with the kernels of an H100, in bf16 and with fp8 weights."""
    fp8 = {"name": FP8, "weights": [{"pass": "quantize_weights", "match": "layers/.*", "format": "fp8_e4m3"}]}
    recipes = (Recipe.from_yaml(BF16), Recipe.from_dict(fp8 | {"lower": [{"pass": "fuse_projections"}]}))
    plans = [optx.plan(step.source("qwen3-8b", "bfloat16"), recipe, "h100") for recipe in recipes]
    return {plan.recipe.name: lower.choose(plan.tree, plan.target) for plan in plans}


def apart(tree):
    """The tree with a kernel for each product of one token, as `STEPS` were measured."""
    tree = ir.shallow(tree)
    for layer in tree.layers:
        layer.choices = tuple(choice for choice in layer.choices if choice.op != "chained_matmul")
    return tree


def kernels(name: str, batch: int) -> list[tuple[str, float]]:
    layer, head, rest, _ = STEPS[name, batch]
    told = [(f"{kernel}_mosaic_gpu_kernel", 1e-6 * time) for kernel, time in zip(LAYER, layer, strict=True)]
    tail = [("input_reduce_fusion_1", 1e-6 * rest), ("quant_matmul_mosaic_gpu_kernel", 1e-6 * head)]
    return [*told * 36, *tail]


def seen(trees, name: str, batch: int) -> against.Seen:
    return against.Seen(
        model="qwen3-8b",
        recipe=name,
        batch=batch,
        context=896,
        tree=apart(trees[name]),
        seconds=1e-3 * STEPS[name, batch][-1],
        kernels=kernels(name, batch),
    )


def run_of(steps) -> against.Run:
    return against.Run(device="NVIDIA H100 80GB HBM3", date="2026-11-26", seen=steps)


# The model


@pytest.mark.parametrize(
    "op, format, bytes, flops, microseconds",
    [
        ("matmul", "bfloat16", 8e6, 1e9, 4 + 10 + 5),  # 8 us / 0.8; 10 us / 2
        ("matmul", "int4_g64", 8e6, 1e9, 4 + 16),  # groups of any size; its arithmetic does not show
        ("matmul", "int8", 8e6, 1e9, 4 + 10),  # not measured: launch and bound, which is the arithmetic's here
        ("attention", "int8", 7e6, 1e6, 4 + 10),
        ("experts", "int4_g64", 8e6, 1e6, 4 + 8),  # not measured
        ("vectors", "bfloat16", 1e3, 0, 1e-3),  # in other kernels
    ],
)
def test_seconds_of_an_op(op, format, bytes, flops, microseconds):
    cost = OpCost(path="layers/0/a", op=op, format=format, dtype="bf16", weights=bytes, flops=flops)
    assert 1e6 * predict.site_seconds(cost, MADE) == pytest.approx(microseconds)


def test_a_step_is_its_parts_and_what_lies_around_them(trees):
    ops = step_ops(trees[BF16], batch=8, context=896)
    found = predict.predict(trees[BF16], ops, MADE, batch=8)
    assert found.small == 36 * 5 + predict.STEP == 190, "as the profiles have"
    parts = sum(predict.site_seconds(op, MADE) for op in ops)
    assert found.seconds == pytest.approx(parts + 190 * 2e-6 + 50e-6)
    assert sum(part.bytes for part in found.parts) == sum(op.bytes for op in ops)
    assert found.unmeasured == (), "no source is named"
    bounds = predict.predict(trees[BF16], ops, dataclasses.replace(MADE, decode=None), batch=8)
    assert bounds.seconds == pytest.approx(sum(op.seconds(MADE) for op in ops)) and bounds.source is None
    assert predict.predict(trees[BF16], ops, dataclasses.replace(MADE, bandwidth=None), batch=8) is None


def test_a_chain_costs_two_of_its_products_and_no_kernels_between(trees):
    ops = step_ops(trees[BF16], batch=1, context=896)
    together, apart_ = (predict.predict(tree, ops, MADE, batch=1) for tree in (trees[BF16], apart(trees[BF16])))
    assert apart_.small == 190 and together.small == 190 - 36 * 3
    assert apart_.seconds - together.seconds == pytest.approx(36 * (2 * 4e-6 + 3 * 2e-6))


def test_a_mesh_adds_its_link():
    tree = optx.plan(step.source("qwen3-8b", "bfloat16"), Recipe.from_yaml(BF16), "h100").tree
    one, two = (estimate(tree, H100, context=896, mesh=optx.cost_mesh.Mesh(tensor=n)) for n in (1, 2))
    link = sum(exchange.seconds(H100.link) for exchange in two.decode.exchanges)
    assert two.predicted.between == pytest.approx(one.predicted.between + link) and link > 0
    assert one.predicted.seconds / 2 < two.predicted.seconds < one.predicted.seconds


# The shipped figures


@pytest.mark.parametrize("name, batch", STEPS)
def test_the_shipped_figures_of_an_h100_predict_its_steps(trees, name, batch):
    found = estimate(apart(trees[name]), H100, batch=batch, context=896)
    # These steps are other runs than the ones that the figures were fitted to.
    assert 1e3 * found.predicted.seconds == pytest.approx(STEPS[name, batch][-1], rel=0.05)
    assert found.predicted.seconds > found.tpot, "no faster than the bound"


@pytest.mark.parametrize("name, milliseconds", [(BF16, 5.447), (FP8, 3.274)])
def test_they_predict_steps_of_one_token_whose_products_are_chained(trees, name, milliseconds):
    """Milliseconds a token of `bench.serve --in_process` at about 256 tokens, one H100 80GB HBM3."""
    found = estimate(trees[name], H100, batch=1, context=256)
    assert 1e3 * found.predicted.seconds == pytest.approx(milliseconds, rel=0.05)


def test_plan_says_what_it_predicts_by(capsys):
    assert cli.run(["plan", "qwen3-8b", "--recipe", "int4_kv8", "--target", "h100", "--context", "896"]) == 0
    text = capsys.readouterr().out
    assert "TPOT " in text and "predicted: TPOT " in text and "efficiencies and launches: kernels timed (CUPTI)" in text
    assert cli.run(["plan", "qwen3-8b", "--target", "mi300x", "--context", "896"]) == 0
    assert "predicted: those bounds alone; what the kernels reach on mi300x was not measured" in capsys.readouterr().out
    both = ["--target", "h100", "--target", "mi300x", "--context", "896"]
    assert cli.run(["plan", "qwen3-8b", *both]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("none ")]
    assert [row[-1] == "-" for row in rows] == [False, True]
    assert cli.run(["plan", "qwen3-8b", *both, "--json"]) == 0
    measured_, other = (plan["estimate"] for plan in json.loads(capsys.readouterr().out)["plans"])
    assert measured_["tpot_predicted_seconds"] == measured_["predicted"]["seconds"] > measured_["tpot_seconds"]
    assert float(rows[0][-1]) == pytest.approx(1e3 * measured_["tpot_predicted_seconds"], rel=1e-3)
    assert other["tpot_predicted_seconds"] is None


# Kernels to ops


def cost(layer: int | None, name: str, op: str, format: str, bytes: float) -> OpCost:
    path = name if layer is None else f"layers/{layer}/{name}"
    return OpCost(path=path, op=op, format=format, dtype="bf16", weights=bytes, flops=bytes)


def test_kernels_go_to_ops_layer_by_layer_and_by_length():
    """Layer 0 in bf16, layer 1 in int4, then the head; a small product before a large one, which the tree has after it."""
    ops = (
        cost(0, "o", "matmul", "bfloat16", 1e6),
        cost(0, "up", "matmul", "bfloat16", 9e6),
        cost(1, "o", "matmul", "int4", 1e6),
        cost(1, "up", "matmul", "bfloat16", 9e6),
        cost(None, "output", "head", "bfloat16", 20e6),
        cost(0, "mixer", "attention", "bfloat16", 1e6),
    )
    told = [
        *[("quant_matmul_k", 10.0), ("paged_decode_k", 7.0), ("paged_decode_merge_k", 0.5), ("quant_matmul_k", 3.0)],
        *[("quant_matmul_k", 2.0), ("quant_matmul_k", 11.0), ("loop_fusion_3", 0.25), ("quant_matmul_k", 30.0)],
    ]
    found = profile.by_op(told, ops, lambda op: op.bytes)
    assert found.seconds == {
        ("matmul", "bfloat16"): 10.0 + 3.0 + 11.0,
        ("matmul", "int4"): 2.0,
        ("head", "bfloat16"): 30.0,
        ("attention", "bfloat16"): 7.0,
    }
    assert found.rest == 0.75 and found.total == sum(seconds for _, seconds in told)
    samples = {(s.op, s.format, s.bytes): (s.kernels, s.seconds) for s in found.samples}
    assert samples["matmul", "bfloat16", 18e6] == (2, 21.0) and samples["matmul", "bfloat16", 1e6] == (1, 3.0)


def test_another_number_of_kernels_is_shared_as_predicted():
    ops = (cost(0, "a", "matmul", "int8", 1e6), cost(0, "b", "matmul", "bfloat16", 3e6))
    found = profile.by_op(
        [("gemm_fusion_dot_1", 3.0), ("gemm_fusion_dot_2", 4.0), ("nvjet_x", 5.0)], ops, lambda op: op.bytes
    )
    assert found.seconds == {("matmul", "int8"): pytest.approx(3.0), ("matmul", "bfloat16"): pytest.approx(9.0)}
    assert {(s.format, s.kernels) for s in found.samples} == {("int8", 1), ("bfloat16", 1)}


def test_kernels_of_an_op_that_the_plan_does_not_have_are_the_rest():
    found = profile.by_op([("grouped_matmul_k", 3.0)], (cost(0, "a", "matmul", "int8", 1e6),), lambda op: op.bytes)
    assert found.rest == 3.0 and found.seconds == {}


# Figures out of measurements


def test_measured_steps_predict_another(trees):
    """Batch 1 and 32 in bf16 and batch 1 in fp8 tell batch 4, by op."""
    others = [seen(trees, *each) for each in ((BF16, 1), (BF16, 32), (FP8, 1))]
    found = against.compare(seen(trees, BF16, 4), against.fitted(run_of(others), H100))
    assert found.ratio == pytest.approx(1, abs=0.01)
    ratios = {(op.op, op.format): op.ratio for op in found.ops}
    assert ratios["matmul", "bfloat16"] == pytest.approx(1, abs=0.02)
    assert ratios["head", "bfloat16"] == pytest.approx(1, abs=0.02)
    assert ratios["attention", "bfloat16"] == pytest.approx(1, abs=0.15)
    assert ratios[measured.REST, ""] == pytest.approx(1, abs=0.1)
    assert sum(op.measured_seconds for op in found.ops) == pytest.approx(found.measured_seconds)
    assert sum(op.predicted_seconds for op in found.ops) == pytest.approx(found.predicted_seconds)
    bound = against.compare(seen(trees, BF16, 4), dataclasses.replace(H100, decode=None))
    assert bound.predicted_seconds == bound.bound_seconds < 0.8 * bound.measured_seconds


def test_a_fit_finds_the_figures_that_made_the_times(trees):
    """Kernels as long as MADE's figures say, at three batches, give those figures back."""
    made = []
    for batch in (1, 8, 64):
        ops = step_ops(trees[BF16], batch=batch, context=896)
        times = {op.path: predict.site_seconds(op, MADE) for op in ops}
        order = [path for i in range(36) for path in (f"layers/{i}/mixer/qkv", f"layers/{i}/mixer/o",
                                                      f"layers/{i}/mlp/gate_up", f"layers/{i}/mlp/down")]  # fmt: skip
        told = [("quant_matmul", times[path]) for path in (*order, "output")]
        told += [("paged_decode", times[f"layers/{i}/mixer"]) for i in range(36)] + [("add_norm", 2e-6)] * 190
        total = sum(seconds for _, seconds in told) + 50e-6
        made.append(
            against.Seen(
                model="x", recipe=BF16, batch=batch, context=896, tree=apart(trees[BF16]), seconds=total, kernels=told
            )
        )
    found = against.fitted(run_of(made), dataclasses.replace(MADE, decode=None)).decode
    assert found.launch == pytest.approx(4e-6, rel=1e-4) and found.between == pytest.approx(50e-6, rel=1e-4)
    assert found.small == pytest.approx(2e-6)
    assert found.of("matmul", "bfloat16").memory == pytest.approx(0.8, rel=1e-4)
    assert found.of("matmul", "bfloat16").compute == pytest.approx(2.0, rel=1e-3)
    assert found.of("head", "bfloat16").memory == pytest.approx(0.9, rel=1e-3)
    assert found.of("attention", "bfloat16").memory == pytest.approx(1, rel=1e-3), "not in MADE: at its bound"


def test_a_fit_counts_what_chains_spare(trees):
    """The time of all products in 36 kernels, two of four spared: the launch that made them is found."""
    made = []
    for batch in (1, 8, 64):
        tree, ops = trees[BF16] if batch == 1 else apart(trees[BF16]), step_ops(trees[BF16], batch=batch, context=896)
        less = predict.spared(tree, batch) * 4e-6
        products = [predict.site_seconds(op, MADE) for op in ops if op.op == "matmul"]
        told = [("quant_matmul" if batch > 1 else "chained_matmul", seconds) for seconds in products]
        told = told if batch > 1 else [("chained_matmul", (sum(products) - less) / 36)] * 36
        told += [("quant_matmul", predict.site_seconds(op, MADE)) for op in ops if op.op == "head"]
        told += [("paged_decode", predict.site_seconds(op, MADE)) for op in ops if op.op == "attention"]
        told += [("add_norm", 2e-6)] * predict.small_kernels(tree, batch)
        total = sum(seconds for _, seconds in told) + 50e-6
        about = {"model": "x", "recipe": BF16, "batch": batch, "context": 896}
        made.append(against.Seen(**about, tree=tree, seconds=total, kernels=told))
    assert less == 0 and predict.spared(made[0].tree, 1) == 72
    found = against.fitted(run_of(made), dataclasses.replace(MADE, decode=None)).decode
    # Of one token products and head are told apart by what is predicted alone.
    assert found.launch == pytest.approx(4e-6, rel=0.1) and found.small == pytest.approx(2e-6)


def test_nothing_timed_is_nothing_fitted(trees):
    blind = dataclasses.replace(seen(trees, BF16, 1), kernels=None)
    with pytest.raises(RequestError, match="no kernel was timed"):
        against.fitted(run_of([blind]), H100)
    whole = against.compare(blind, H100)
    assert {op.measured_seconds for op in whole.ops} == {None} and whole.ratio == pytest.approx(1, abs=0.05)


def test_figures_are_kept_beside_what_a_target_has(folder):
    folder.mkdir(parents=True)
    price = {"title": "ours", "figures": ["price"]}
    (folder / "mine.yaml").write_text(
        yaml.safe_dump({"like": "h200", "price": {"dollars": 2, "per": "hour"}, "sources": [price]})
    )
    told = target.Source(title="optx bench decode --against-plan on Made 9000, 2026-11-26", figures=("decode",))
    path = fit.store("mine", MADE.decode, "Made 9000", told)
    kept = target.get("mine")
    assert path == folder / "mine.yaml" and kept.price.dollars == 2
    assert kept.decode.efficiency == MADE.decode.efficiency and kept.decode.between == pytest.approx(50e-6)
    assert (kept.bandwidth, kept.like) == (TARGETS["h200"].bandwidth, "h200")
    assert kept.source("decode") == told
    fit.store("mine", dataclasses.replace(MADE.decode, launch=3e-6), "Made 9000", told)
    assert target.get("mine").decode.launch == pytest.approx(3e-6)
    assert len([s for s in target.get("mine").sources if s.figures == ("decode",)]) == 1, "one source of a figure"
    fit.store("fresh", MADE.decode, "NVIDIA H100 80GB HBM3", told)
    assert yaml.safe_load((folder / "fresh.yaml").read_text())["like"] == "h100"
    with pytest.raises(RequestError, match="Made 9000 is not in the table of targets and not here to be measured"):
        fit.store("other", MADE.decode, "Made 9000", told)


def test_shares_go_with_the_bandwidth_that_they_are_of(folder):
    folder.mkdir(parents=True)
    (folder / "slow.yaml").write_text("like: h100\nbandwidth: 3 TB/s\n")
    (folder / "cheap.yaml").write_text("like: h100\nprice: {dollars: 1, per: hour}\n")
    assert target.get("slow").decode is None and target.get("slow").source("decode") is None
    assert target.get("cheap").decode == H100.decode


@pytest.mark.parametrize(
    "decode, told",
    [
        ("{launch: 4 us, small: 2 us, between: 9 us}", "decode: missing field 'efficiency'"),
        (
            "{launch: 4 s, small: 2 us, between: 9 us, efficiency: {}}",
            "decode.launch: got '4 s'; allowed: a number above 0",
        ),
        (
            "{launch: 4 us, small: 2 us, between: 9 us, efficiency: [1]}",
            "decode.efficiency: got [1]; allowed: a mapping",
        ),
        ("{launch: 4 us, small: 2 us, between: 9 us, efficiency: {a/b: {memroy: 1}}}", "did you mean 'memory'?"),
        ("{launch: 4 us, small: 2 us, between: 9 us, efficiency: {a/b: {memory: 0}}}", "allowed: shares above 0"),
        (
            "{launch: 4 us, small: 2 us, between: 9 us, efficiency: {a/b: {memory: 1, compute: 0}}}",
            "allowed: shares above 0",
        ),
    ],
)
def test_wrong_figures(folder, decode, told):
    folder.mkdir(parents=True)
    (folder / "bad.yaml").write_text(f"like: h100\ndecode: {decode}\n")
    with pytest.raises(LoweringError) as error:
        target.get("bad")
    assert "bad.yaml" in str(error.value) and told in str(error.value)


# The command


def bench(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.run(["bench", "decode", "--against-plan", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def test_recipes_of_the_bench_ship():
    assert [Recipe.from_yaml(name).name for name in against.RECIPES] == list(against.RECIPES)


def test_without_kernel_times_whole_steps_are_compared(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step.timing, "read_ceiling", lambda: 1e10)
    out = tmp_path / "out.json"
    code, text, _ = bench(
        capsys, "--shape", config, "--recipe", "int8_kv8", "--batch", 2, "--context", 20, "--out", out
    )
    assert code == 0 and "whole steps only: cpu does not tell the times of kernels" in text
    assert "its bounds alone: no efficiencies of its kernels are stored" in text and "tiny + int8_kv8" in text
    found = measured.read(out)
    assert (found.device, found.target, found.source) == ("cpu", "cpu", None)
    (one,) = found.steps
    assert (one.recipe, one.batch, one.context) == ("int8_kv8", 2, 20)
    planned = optx.plan(optx.load_config(config), Recipe.from_yaml("int8_kv8"))
    moved = sum(op.bytes for op in step_ops(planned.tree, batch=2, context=20))
    assert one.bound_seconds == one.predicted_seconds == pytest.approx(moved / 1e10)
    assert one.measured_seconds > one.bound_seconds and one.kernels == []


def test_with_kernel_times_figures_are_stored_and_predict(config, capsys, folder, monkeypatch):
    """CUPTI's list is made up: products that take 5 us and 2 us a row of the batch, attention 7 us a row."""
    batches = []

    def timings(run):
        batch = len(run.args[0].counts)
        batches.append(batch)
        layer = [("quant_matmul_k", 0.005)] * 4 + [("paged_decode_k", 0.007 * batch), ("add_norm_k", 0.001)]
        return [*layer * 2, ("gemm_fusion_dot_1", 0.009)]

    monkeypatch.setattr(profile, "available", lambda: True)
    monkeypatch.setattr(profile, "timings", timings)
    monkeypatch.setattr(step.timing, "read_ceiling", lambda: 1e10)
    ceilings = step.timing.Ceilings(device="cpu", read=1e10, bf16=1e11)
    monkeypatch.setattr(step.timing, "ceilings", lambda: ceilings)
    common = ["--shape", config, "--recipe", "int8_kv8", "--batch", 1, "--batch", 4, "--context", 20]
    code, text, _ = bench(capsys, *common, "--store", "mine")
    assert code == 0 and set(batches) == {1, 4} and len(batches) == 2 * profile.REPEATS
    assert (
        "efficiencies: optx bench decode --against-plan on cpu" in text and "optx plan qwen3-8b --target mine" in text
    )
    assert all(name in text for name in ("everything else", "between kernels", "whole step", "attention"))
    kept = target.get("mine").decode
    assert kept.launch > 0 and kept.of("matmul", "int8").memory > 0 and (folder / "mine.yaml").is_file()
    code, out, _ = bench(capsys, *common, "--target", "mine", "--json")
    data = json.loads(out)
    assert code == 0 and data["source"].startswith("optx bench decode --against-plan on cpu")
    (_, four) = data["steps"]
    ops = {(op["op"], op["format"]): op for op in four["ops"]}
    assert ops["attention", "int8"]["measured_seconds"] == pytest.approx(2 * 4 * 7e-6)
    assert ops["matmul", "int8"]["measured_seconds"] + ops["head", "float32"]["measured_seconds"] == pytest.approx(
        8 * 5e-6 + 9e-6
    )
    assert ops[measured.REST, ""]["measured_seconds"] == pytest.approx(2e-6)
    assert cli.run(["plan", str(config), "--recipe", "int8_kv8", "--target", "mine"]) == 0
    assert "efficiencies and launches: optx bench decode --against-plan on cpu" in capsys.readouterr().out


def test_steps_of_files_are_fitted_without_the_device(trees, folder, tmp_path, capsys):
    """A file a run, as of an H100; the JSON of both together predicts each."""
    names = []
    for batch in (1, 4, 32):
        one = against.compare(seen(trees, BF16, batch), H100)
        kept = measured.Measured(
            device="NVIDIA H100 80GB HBM3", date="2026-11-26", target="h100", source=None, steps=(one,)
        )
        names += [tmp_path / f"{batch}.json"]
        names[-1].write_text(json.dumps(kept.to_dict()))
    files = [part for name in names for part in ("--measured", name)]
    code, text, _ = bench(capsys, *files, "--store", "mine")
    assert code == 0 and "within 15% of measured: 3 of 3" in text
    mine = target.get("mine")
    assert mine.like == "h100" and mine.source("decode").title.startswith(
        "optx bench decode --against-plan on NVIDIA H100 80GB HBM3, 2026-11-26"
    )
    assert mine.decode.of("attention", "bfloat16").memory == pytest.approx(0.83, abs=0.02)
    code, out, _ = bench(capsys, *files, "--target", "mine", "--json")
    assert [step["batch"] for step in json.loads(out)["steps"]] == [1, 4, 32]
    one = dataclasses.replace(measured.read(names[0]), device="Made 9000")
    names[1].write_text(json.dumps(one.to_dict()))
    assert bench(capsys, *files)[0] == 2
    assert bench(capsys, *files[:2], "--batch", 1)[2].strip().endswith("which has steps of its own")


def test_wrong_command_lines(config, capsys, tmp_path):
    for arguments, code, told in (
        (["bench", "decode", "--store", "x"], 2, "--store goes with --against-plan"),
        (["bench", "decode", "--target", "h100"], 2, "--target goes with --against-plan"),
        (["bench", "decode", "--against-plan", "--store", "h100"], 1, "target name 'h100'"),
        (["bench", "decode", "--against-plan", "--store", "x"], 2, "does not tell the times of kernels; run it on"),
        (["bench", "decode", "--against-plan", "--target", "h10"], 1, "did you mean 'h100'?"),
        (["bench", "kernels", "--against-plan"], 2, "bench kernels: --against-plan says nothing here"),
    ):
        assert cli.run(arguments) == code
        assert told in capsys.readouterr().err
    (tmp_path / "old.json").write_text('{"form": "another"}')
    with pytest.raises(RequestError, match=r"old.json: form: got 'another'; allowed"):
        measured.read(tmp_path / "old.json")
    (tmp_path / "cut.json").write_text(json.dumps({"form": measured.FORM, "device": "x"}))
    with pytest.raises(RequestError, match=r"cut.json: missing field 'date' of Measured"):
        measured.read(tmp_path / "cut.json")
