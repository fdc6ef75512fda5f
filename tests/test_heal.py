"""Healing: losses against plain numpy, what moves when, gradients of every family, runs that are split, killed or repeated."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import healing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import optx
from optx import cli, heal_data, ir, lora
from optx.checkpoint.source import fill
from optx.heal import heal
from optx.heal_loss import cast, converted, losses, narrow, routers, values_of
from optx.heal_phases import Phase, phases
from optx.heal_run import Run
from optx.heal_state import LOG, State, rows
from optx.passes.distill import Distill

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def source():
    return healing.source()


@pytest.fixture(scope="module")
def student(source):
    return healing.converted(source)


def numbers(model):
    return {name: np.asarray(value) for name, value in values_of(model).items()}


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def run(source, student, options, folder):
    """-> (the healed model, what was won back, lines of the log without the clock)."""
    out, found = heal(source, source.load(), student, options, folder=folder)
    return out, found, timeless(folder / LOG)


def timeless(path):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(path)]


# Losses


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_losses_against_numpy(family):
    teacher, student = families.concrete(family, 0), families.concrete(family, 1)
    tokens = np.asarray([families.prompt(16, seed) for seed in (1, 2)], np.int32)
    found, _ = losses(ir.shallow(teacher), ir.shallow(student), jnp.asarray(tokens), hidden=True)
    p, q = (np.stack([log_softmax(families.oracle(m, row)) for row in tokens])[:, :-1] for m in (teacher, student))
    assert found["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    following = tokens[:, 1:, None]
    assert found["nll"] == pytest.approx(-np.take_along_axis(q, following, -1).mean(), rel=1e-5)
    assert found["teacher_nll"] == pytest.approx(-np.take_along_axis(p, following, -1).mean(), rel=1e-5)
    count, ragged = len(teacher.layers), optx.cache.Ragged.dense(2, 16)
    states = []
    for model in (teacher, student):
        last, _, taps = model.backbone(jnp.asarray(tokens).reshape(-1), ragged, taps=tuple(range(1, count)))
        states.append([np.asarray(x, np.float64) for x in (*taps, last)])
    each = [((a - b) ** 2).sum(-1) / (a**2).sum(-1) for a, b in zip(*states, strict=True)]
    assert len(each) == count and found["hidden"] == pytest.approx(np.mean(each), rel=1e-4)


def test_a_model_is_no_distance_from_itself(source):
    tokens = jnp.asarray([families.prompt(12)])
    found, _ = losses(source.load(), source.load(), tokens, hidden=True)
    assert abs(float(found["kl"])) < 1e-6 and float(found["hidden"]) == 0
    assert "auxiliary" not in found, "no layer has a loss of its own"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gemma3_softcap", "gpt_oss", "mixtral", "deepseek_v32", "nemotron_h_latent"),
        *("mamba2", "jamba", "minimax", "qwen3_next"),
    ],
)
def test_gradients_reach_every_parameter(name):
    """One tiny model of every kind of mixer and of router; what is chosen by a hard top-k alone has no gradient."""
    model = optx.load(str(GOLDENS / name), dtype="float32").load()
    form, values, rng = ir.abstract(model), values_of(model), np.random.default_rng(0)
    moved = {n: x + 0.05 * (float(jnp.abs(x).mean()) + 0.01) * rng.standard_normal(x.shape) for n, x in values.items()}
    moved = {n: x.astype(jnp.float32) for n, x in moved.items()}
    tokens = jnp.asarray(rng.integers(0, values["embed/table"].shape[0], (2, 20)), jnp.int32)

    def loss(moved):
        pair = (fill(form, x.__getitem__) for x in (values, moved))
        found, loads = losses(*pair, tokens, hidden=True)
        return found["kl"] + found["hidden"], loads

    slopes, loads = jax.jit(jax.grad(loss, has_aux=True))(moved)
    still = {n for n, slope in slopes.items() if not np.any(np.asarray(slope))}
    assert {n for n in still if not n.endswith("/selection_bias") and "/indexer/" not in n} == set()
    assert all(np.all(np.isfinite(np.asarray(slope))) for slope in slopes.values())
    assert len(loads) == len(routers(model)) and all(int(load.sum()) % tokens.size == 0 for load in loads)


def test_gradients_pass_every_kind_of_cache():
    """Among them keys and values that a later layer reads of an earlier one."""
    teacher, student = families.hybrid(0), families.hybrid(1)
    form, values, tokens = ir.abstract(teacher), values_of(teacher), jnp.asarray([families.prompt(16)])

    def loss(moved):
        return losses(*(fill(form, x.__getitem__) for x in (values, moved)), tokens, hidden=False)[0]["kl"]

    slopes = {name: np.asarray(slope) for name, slope in jax.jit(jax.grad(loss))(values_of(student)).items()}
    assert all(np.any(slope) and np.all(np.isfinite(slope)) for slope in slopes.values())


def test_layers_of_one_form_are_compiled_once():
    def products(layers):
        model = families.concrete("llama", num_hidden_layers=layers)
        tokens = jnp.asarray([families.prompt(16)])
        return str(
            jax.make_jaxpr(lambda tokens: losses(*(ir.shallow(model) for _ in range(2)), tokens, hidden=True))(tokens)
        ).count("dot_general")

    assert products(2) == products(5) > 0


# What moves


def test_converted_parts(source, student):
    changed = converted(source.tree, student)
    assert changed == {f"layers/0/mixer/{name}/weight" for name in ("q", "k", "v", "o")}
    assert converted(source.tree, source.load()) == frozenset()


def test_phases(source, student, tmp_path):
    first, second = phases(source.tree, student, healing.options(tmp_path, converted=0.25))
    assert (first.start, first.stop, second.start, second.stop) == (0, 0.25, 0.25, 1)
    assert set(first.moving) == converted(source.tree, student) < set(second.moving) == values_of(student).keys()
    (only,) = phases(source.tree, student, healing.options(tmp_path, train="converted"))
    assert (only.start, only.stop) == (0, 1) and set(only.moving) == set(first.moving)
    (alone,) = phases(source.tree, student, healing.options(tmp_path, converted=0.0))
    assert alone.name == "all" and alone.start == 0


def test_rate_rises_then_falls_to_nothing(tmp_path):
    options = healing.options(tmp_path, lr=1.0, warmup=0.1)
    phase = Phase(name="all", moving=(), start=0.2, stop=1.0)
    places = [0.2 + 0.8 * i / 100 for i in range(100)]
    rates = [phase.rate(place, 0.008, options) for place in places]
    falls = [0.5 * (1 + math.cos(math.pi * place)) for place in places]
    assert [rate / fall for rate, fall in zip(rates, falls, strict=True)] == pytest.approx(
        [*(0.1 * (i + 1) for i in range(10)), *[1.0] * 90]
    )
    assert 0 < rates[99] < 1e-3 and all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_what_was_not_converted_moves_less(source, student, tmp_path):
    first, second = phases(source.tree, student, healing.options(tmp_path))
    assert not first.gentle and second.gentle == values_of(student).keys() - set(first.moving)
    (lora,) = (
        phase for phase in phases(source.tree, student, healing.options(tmp_path, train="lora")) if phase.name == "lora"
    )
    assert not lora.gentle
    moved = {}
    for others in (0.0, 0.5):
        state = State(tmp_path / str(others))
        run = Run(source.load(), student, healing.options(tmp_path, others=others, converted=0.0), state)
        run.train(*heal_data.sequences(source, run.options))
        moved[others] = {name: float(jnp.abs(run.value(name) - x).max()) for name, x in values_of(student).items()}
    gentle = second.gentle
    assert not any(moved[0.0][name] for name in gentle) and all(moved[0.5][name] for name in gentle)
    assert all(moved[others][name] for others in moved for name in first.moving)


def test_vectors_that_are_no_part_of_products_stay_wide():
    model = optx.load(str(GOLDENS / "jamba"), dtype="float32").load()
    values = cast(values_of(model), narrow(model), "bfloat16")
    wide = {name.rpartition("/")[2] for name, x in values.items() if x.dtype == jnp.float32}
    assert {"dt_bias", "skip"} <= wide and not wide & {"weight", "table"}


# Runs


@pytest.fixture(scope="module")
def sharp(source):
    """The model with attention of layer 0 three times as sharp, which its projections can make good."""
    out = source.load()
    layer = out.layers[0]
    ir.put(out, "layers/0", ir.replace(layer, mixer=ir.replace(layer.mixer, scale=3 * layer.mixer.scale)))
    return out


@pytest.fixture(scope="module")
def healed(source, sharp, tmp_path_factory):
    folder = tmp_path_factory.mktemp("healed")
    options = healing.options(folder, steps=80, every=40, converted=0.5)
    return *run(source, sharp, options, folder / "state"), options, folder


def test_kl_falls_on_text_that_was_not_trained_on(sharp, healed):
    out, found, log, *_ = healed
    assert found.kl[1] < 0.35 * found.kl[0] and found.steps == 80 and found.tokens == 80 * 4 * 24
    held = [row["kl"] for row in log if row["kind"] == "held_out"]
    assert held[0] == found.kl[0] and held[-1] == found.kl[1] and held[2] < held[1] < held[0]
    assert found.kv_bytes[1] == found.kv_bytes[0] and found.weight_bytes[0] == found.weight_bytes[1]
    assert ir.signature(ir.abstract(out)) == ir.signature(ir.abstract(sharp))
    train = [row for row in log if row["kind"] == "train"]
    assert [row["phase"] for row in train] == ["converted"] * 40 + ["all"] * 40
    assert [row["step"] for row in train] == list(range(1, 81))


def test_the_curve_is_drawn(healed):
    from PIL import Image

    folder = healed[-1]
    with Image.open(folder / "state" / "curves.png") as picture:
        colours = set(picture.convert("RGB").get_flattened_data())
    assert {(0x1F, 0x5F, 0xC4), (0xB4, 0x56, 0x0B)} <= colours, "training and held-out lines"


def test_a_run_that_has_ended_is_read(source, sharp, healed):
    out, found, log, options, folder = healed
    again, same_found, same_log = run(source, sharp, options, folder / "state")
    assert same(numbers(again), numbers(out)) and same_found == found and same_log == log
    assert not (folder / "state" / "steps").exists()


def test_only_converted_parts_move_in_the_first_phase(source, student, tmp_path):
    out, found, _ = run(source, student, healing.options(tmp_path, train="converted"), tmp_path / "state")
    assert found.kv_bytes[1] < found.kv_bytes[0]
    before, after = numbers(student), numbers(out)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == converted(source.tree, student) and found.moved == sum(before[name].size for name in moved)


def test_adapters_are_merged_and_of_low_rank(source, student, tmp_path):
    options = healing.options(tmp_path, train="lora", rank=2, converted=0.0)
    out, _, _ = run(source, student, options, tmp_path / "state")
    before, after = numbers(student), numbers(out)
    assert before.keys() == after.keys() and not any(part.adapter for part in _linears(out))
    ranks = {n: np.linalg.matrix_rank(after[n] - before[n], 1e-5) for n in before if before[n].ndim == 2}
    whole = converted(source.tree, student)
    assert {rank for name, rank in ranks.items() if name in whole} == {16, 32}
    assert {rank for name, rank in ranks.items() if name not in whole and name != "embed/table"} == {2}
    assert ranks["embed/table"] == 0


def _linears(model):
    return [ir.get(model, path) for path in lora.projections(model)]


def test_adapters_add_what_merging_adds(source):
    model, tokens = source.load(), jnp.asarray([families.prompt(9)])
    paths = lora.projections(model)[:5]
    adapted = lora.adapted(model, paths, 3)
    assert np.array_equal(adapted(tokens), model(tokens))
    for i, path in enumerate(paths):
        part = ir.get(adapted, path)
        up = jax.random.normal(jax.random.key(i), part.adapter.up.get_value().shape)
        ir.put(adapted, path, ir.replace(part, adapter=ir.replace(part.adapter, up=0.1 * up)))
    assert families.relative(adapted(tokens), model(tokens)) > 0.01
    assert families.relative(lora.merged(adapted)(tokens), adapted(tokens)) < 1e-5
    assert np.array_equal(ir.get(adapted, paths[0]).adapter(jnp.zeros((1, 32))), jnp.zeros((1, 32)))


def test_parts_of_a_batch_add_up_to_it(source, student, tmp_path):
    common = healing.options(tmp_path, converted=0.0, steps=3)
    whole, _, _ = run(source, student, common, tmp_path / "whole")
    parts, _, _ = run(source, student, dataclasses.replace(common, accumulate=2), tmp_path / "parts")
    assert max(families.relative(numbers(parts)[n], x) for n, x in numbers(whole).items()) < 1e-4
    assert not same(numbers(whole), numbers(student))


def test_products_in_bfloat16_move_float32_weights(source, student, tmp_path):
    """A change below what bfloat16 could hold of a weight is not lost."""
    options = healing.options(tmp_path, dtype="bfloat16", converted=0.0, lr=1e-5, steps=3)
    out, _, _ = run(source, student, options, tmp_path / "state")
    before, after = numbers(student), numbers(out)
    name = "layers/1/mlp/up/weight"
    change = np.abs(after[name] - before[name])
    assert after[name].dtype == np.float32 and 0 < change.max() < 1e-4
    assert np.mean(change > 0) > 0.9, "nearly every number has moved by less than a bfloat16 step"


@pytest.mark.slow
def test_routers_are_kept_in_balance(tmp_path):
    """A bias moves by the rate toward even loads in every step, and no gradient moves it."""
    source = optx.load(str(GOLDENS / "deepseek_v3_plain"), dtype="float32")
    teacher = source.load()
    student = ir.shallow(teacher)
    layer = student.layers[0]
    ir.put(student, "layers/0", ir.replace(layer, mixer=ir.replace(layer.mixer, scale=layer.mixer.scale * 0.5)))
    shard = tmp_path / "tokens.npy"
    np.save(shard, np.random.default_rng(0).integers(0, teacher.embed.table.get_value().shape[0], 2000))
    options = Distill(**(healing.QUICK | {"text": (str(shard),), "steps": 3, "balance": 0.01, "converted": 0.0}))
    out, _, _ = run(source, student, options, tmp_path / "state")
    (name,) = filter(None, routers(student))
    steps = (numbers(out)[name] - numbers(student)[name]) / 0.01
    assert np.allclose(steps, np.round(steps), atol=1e-3) and np.abs(np.round(steps)).max() in (1, 2, 3)


SPLIT = """
import sys; sys.path.insert(0, {tests!r})
import pathlib, jax, healing, families
from optx.heal import heal
from optx.heal_loss import values_of
assert jax.device_count() == 4
folder, source = pathlib.Path({folder!r}), healing.source()
student, found = healing.converted(source), []
for devices in (1, 4):
    options = healing.options(folder, devices=devices, converted=0.0, steps=3)
    out, won = heal(source, source.load(), student, options, folder=folder / str(devices))
    found.append((values_of(out), won.kl))
(one, kl_one), (four, kl_four) = found
print(max(families.relative(four[n], x) for n, x in one.items()), abs(kl_one[1] / kl_four[1] - 1))
"""


@pytest.mark.slow
def test_a_batch_over_four_devices_is_the_same_batch(tmp_path):
    code = SPLIT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    weights, kl = map(float, done.stdout.split()[-2:])
    assert weights < 1e-4 and kl < 1e-4


def test_killed_and_resumed_is_bit_equal(tmp_path, monkeypatch):
    """`optx heal`, killed at once when it has passed the middle, gives what one that ran through gives, bit for bit."""
    model = tiny.checkpoint(tmp_path / "tiny")
    recipe = tmp_path / "sliding.yaml"
    recipe.write_text("attention: [{pass: sliding_window, window: 6, sinks: 1, layers: [0]}]\n", encoding="utf-8")
    flags = {"recipe": recipe, "text": healing.text(tmp_path), "steps": 24, "batch": 2, "context": 24, "every": 8}
    flags |= {"held_out": 2, "converted": 0.5, "lr": 0.003}
    command = ["heal", str(model), *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]

    def folder(name):
        return tmp_path / name / "optx" / "heal"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "straight"))
    assert cli.run([*command, "--out", str(tmp_path / "one")]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "killed"))
    with subprocess.Popen([sys.executable, "-m", "optx", *command, "--out", str(tmp_path / "two")]) as started:
        while started.poll() is None and not any(_steps(path) > 12 for path in folder("killed").glob(f"*/{LOG}")):
            time.sleep(0.01)
        assert started.poll() is None, "it was to be killed before its end"
        started.send_signal(signal.SIGKILL)
    assert not (tmp_path / "two").exists()
    (left,) = folder("killed").iterdir()
    assert [path.name for path in (left / "steps").iterdir() if path.name.isdigit()], "a checkpoint is there"
    assert cli.run([*command, "--out", str(tmp_path / "two")]) == 0
    (straight,) = folder("straight").iterdir()
    assert left.name == straight.name and timeless(left / LOG) == timeless(straight / LOG)
    one, two = (optx.load(str(tmp_path / name)).load() for name in ("one", "two"))
    assert same(numbers(one), numbers(two)) and not same(numbers(one), numbers(optx.load(str(model)).load()))
    assert {path.name for path in (tmp_path / "two").glob("healing.*")} == {"healing.jsonl", "healing.png"}
    assert json.loads((tmp_path / "two" / "healing.jsonl").read_text().splitlines()[-1])["kind"] == "held_out"


def _steps(path):
    return sum(row["kind"] == "train" for row in rows(path))
