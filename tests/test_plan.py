"""`optx plan`: recipes and targets side by side, the reasons of refusals, and how little of it is traced."""

import dataclasses
import json
import re

import families
import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

import optx
from optx import api, cli, ir, legality, pipeline, tensor, verify
from optx.checkpoint.source import from_module
from optx.plan_table import folded
from optx.recipe import Recipe

RECIPES, TARGETS = ("int8_kv8", "fp8_kv8"), ("h100", "rtx-4090")
LOW_KEYS = "name: keys4\ncache:\n  - {pass: quantize_kv, format: int4}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def plan_(capsys):
    """Runs `optx plan` -> (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.run(["plan", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def keys4(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "keys4.yaml"
    path.write_text(LOW_KEYS, encoding="utf-8")
    return path


def flags(name, values):
    return [part for value in values for part in (f"--{name}", value)]


def timeless(plan):
    return plan | {"passes": [{k: v for k, v in each.items() if k != "seconds"} for each in plan["passes"]]}


# Side by side


def test_each_pair_is_the_plan_that_it_is_alone(plan_, model):
    common = [model, "--batch", 4, "--context", 100, "--json"]
    code, out, err = plan_(*common, *flags("recipe", RECIPES), *flags("target", TARGETS))
    assert (code, err) == (0, "")
    plans = json.loads(out)["plans"]
    assert [(p["recipe"]["name"], p["target"]) for p in plans] == [(r, t) for r in RECIPES for t in TARGETS]
    for plan in plans:
        alone = plan_(*common, "--recipe", plan["recipe"]["name"], "--target", plan["target"])[1]
        assert timeless(plan) == timeless(json.loads(alone))
    assert len({plan["estimate"]["tpot_seconds"] for plan in plans}) > 1


def test_the_table_has_a_row_a_pair_with_the_figures_of_the_json(plan_, model):
    pairs = [model, *flags("recipe", RECIPES), *flags("target", TARGETS), "--batch", 4, "--context", 100]
    code, out, err = plan_(*pairs)
    assert (code, err) == (0, "")
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    rows = [row for row in rows if row[0] in RECIPES]
    plans = json.loads(plan_(*pairs, "--json")[1])["plans"]
    assert [row[:2] for row in rows] == [[p["recipe"]["name"], p["target"]] for p in plans]
    for row, plan in zip(rows, plans, strict=True):
        estimate = plan["estimate"]
        assert row[2] == ir.size_text(plan["weight_bytes"]) and row[3] == f"{plan['kv_bytes_per_token']:,.0f} B"
        assert row[4] == ir.size_text(plan["after"]["total"]) and row[6] == "yes"
        assert float(row[9].replace(",", "")) == pytest.approx(1e3 * estimate["tpot_seconds"], rel=1e-3)
        assert float(row[10].replace(",", "")) == pytest.approx(1e3 * estimate["ttft_seconds"], rel=1e-3)
        assert float(row[11].replace(",", "")) == pytest.approx(estimate["tokens_per_second"], rel=1e-4)
        assert float(row[12].replace(",", "")) == pytest.approx(estimate["dollars_per_million_tokens"], rel=1e-2)


def test_a_model_that_does_not_fit_says_so_and_unknown_figures_are_dashes(plan_):
    code, out, _ = plan_("qwen3-8b", *flags("target", ("h100", "rtx-4090", "cpu")), "--batch", 64, "--context", 8192)
    rows = {line.split()[1]: re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if line.startswith("none")}
    assert code == 0 and rows["rtx-4090"][6] == "no" and rows["h100"][6] == "no"
    assert set(rows["cpu"][9:]) == {"-"}


def test_an_error_says_which_of_the_recipes_it_is_about(plan_, model, tmp_path):
    recipe = tmp_path / "nowhere.yaml"
    recipe.write_text("weights:\n  - {pass: quantize_weights, format: int8, match: nowhere}\n", encoding="utf-8")
    code, out, err = plan_(model, "--recipe", "int8_kv8", "--recipe", recipe)
    assert (code, out) == (1, "") and err.startswith(
        "error: nowhere: recipe.weights[0].match: 'nowhere' matched no site"
    )
    assert plan_(model, "--recipe", recipe)[2].startswith("error: recipe.weights[0].match")


# Why


def test_why_names_the_refusal_where_it_holds_and_how_to_override_it(plan_, keys4):
    code, out, err = plan_("qwen2.5-7b", "--recipe", keys4, "--target", "h100", "--why")
    assert code == 1 and err.startswith("error: quantize_kv at layers/0/mixer and 27 more: a key bias")
    assert (
        "k_bias_low_bit_kv: holds for quantize_kv at layers/0-27/mixer (paged int4): refused" in out
        and "overlap: does not hold" in out
    )
    assert "override: allow: [k_bias_low_bit_kv] in the recipe" in out
    facts = json.loads(plan_("qwen2.5-7b", "--recipe", keys4, "--target", "h100", "--why", "--json")[1])["legality"]
    assert {f["fact"]: f["value"] for f in facts["facts"]} == {
        "mixer": "Attention",
        "cache": "paged int4",
        "key bias": "yes",
    }
    verdict = {refusal["name"]: refusal for refusal in facts["refusals"]}
    assert verdict.keys() == {"overlap", *(fact.name for fact in legality.FACTS)}
    assert verdict["k_bias_low_bit_kv"]["refused"] and len(verdict["k_bias_low_bit_kv"]["where"]) == 28


def test_an_overridden_refusal_still_holds_and_the_plan_follows(plan_, keys4, tmp_path):
    allowed = tmp_path / "allowed.yaml"
    allowed.write_text(LOW_KEYS + "allow: [k_bias_low_bit_kv]\n", encoding="utf-8")
    code, out, err = plan_("qwen2.5-7b", "--recipe", allowed, "--target", "h100", "--context", 100, "--why")
    assert (code, err) == (0, "")
    assert (
        "k_bias_low_bit_kv: holds for quantize_kv at layers/0-27/mixer (paged int4): allowed by the recipe" in out
        and "quantize_kv" in out
    )


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_why_of_a_recipe_that_cannot_run_says_what_was_read_so_far(plan_, json_):
    code, out, err = plan_("mamba2-2.7b", "--recipe", "int8_kv8", "--target", "h100", "--why", *json_)
    assert code == 1 and err.startswith("error: quantize_kv at layers/0/mixer and 63 more: every layer keeps a state")
    if not json_:
        assert "no_token_cache: holds for quantize_kv at layers/0-63/mixer (state bfloat16): refused" in out
        assert "source: arithmetic: bytes of a state" in out and "override: none" in out
        return
    found = json.loads(out)["legality"]["refusals"]
    (refusal,) = [each for each in found if each["holds"]]
    assert refusal["name"] == "no_token_cache" and refusal["passes"] == ["quantize_kv"] and refusal["override"] is None
    assert refusal["got"] == ["state bfloat16"] and {"why", "fix", "source", "where", "refused"} <= refusal.keys()


def test_why_adds_to_the_plan_and_takes_nothing_away(plan_, model):
    arguments = [model, "--recipe", "int8_kv8", "--target", "h100", "--json"]
    bare, full = (json.loads(plan_(*arguments, *more)[1]) for more in ([], ["--why"]))
    assert timeless({k: v for k, v in full.items() if k != "legality"}) == timeless(bare)
    assert not any(refusal["holds"] for refusal in full["legality"]["refusals"])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_readings_cover_every_mixer_once(family):
    tree = families.abstract(family)
    mixers = [f"layers/{i}/mixer" for i, layer in enumerate(tree.layers) if layer.mixer is not None]
    for values in legality.readings(tree).values():
        assert sorted(path for paths in values.values() for path in paths) == sorted(mixers)


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (["layers/0/mixer", "layers/1/mixer", "layers/3/mixer"], "layers/0-1,3/mixer"),
        (["layers/4", "head"], "layers/4, head"),
        ([f"layers/{i}/mixer" for i in range(0, 40, 2)], "layers/0,2,4,6,8,10,...,38/mixer"),
        (["a (reads) and b (drop)"], "a (reads) and b (drop)"),
        ([], ""),
    ],
)
def test_folded_paths(paths, text):
    assert folded(paths) == text


# What a plan traces


def test_a_forward_is_traced_once_a_tree_and_a_packing_once_a_shape(model, monkeypatch):
    source, traced = optx.load(model), []
    real = verify._eval
    monkeypatch.setattr(verify, "_eval", lambda function, *args: traced.append(function) or real(function, *args))
    verify._logits.cache_clear()
    tensor._quantized_shape.cache_clear()
    passes = len(Recipe.from_yaml("int8_kv8").steps())
    optx.plan(source, Recipe.from_yaml("int8_kv8"), "h100")
    assert len(traced) == (passes + 1) + passes, "logits of every tree, caches of every result"
    weights = {v.get_value().shape for path, v in ir.params(source.tree).items() if path.startswith("layers")}
    packed = tensor._quantized_shape.cache_info()
    assert packed.misses <= len(weights) + 4 < packed.hits + packed.misses, "and of the caches' streams"
    traced.clear()
    optx.plan(source, Recipe.from_yaml("int8_kv8"), "mi300x")
    assert len(traced) == passes, "the logits of these trees are known"


def test_what_is_remembered_of_a_good_model_excuses_no_broken_one():
    tree = families.abstract("llama")
    assert verify.logits_unchanged(tree, tree) is None
    broken = ir.shallow(tree)
    broken.norm = ir.replace(tree.norm, weight=jax.ShapeDtypeStruct((7,), jnp.float32))
    for _ in range(2):
        with pytest.raises(optx.errors.VerifyError, match="after it: logits_unchanged: the model does not run"):
            verify.check(tree, broken, "it", (verify.logits_unchanged,))
    wider = ir.shallow(tree)
    wider.embed = ir.replace(tree.embed, table=jax.ShapeDtypeStruct((99, tree.embed.table.shape[1]), jnp.float32))
    wider.output = None
    assert "logits were" in verify.logits_unchanged(tree, wider)


@pytest.mark.parametrize("name", ["hybrid", *families.FAMILIES])
def test_what_is_remembered_of_parts_and_ops_has_the_shapes_that_they_make(name):
    """The second trace meets only what the first one left; both are what a trace without memory gives."""
    tree = ir.abstract(families.hybrid()) if name == "hybrid" else families.abstract(name)
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    graph, state = nnx.split(tree)
    want = jax.eval_shape(lambda state, tokens: nnx.merge(graph, state)(tokens), state, tokens)
    verify._known.clear()
    assert verify._eval(lambda model, t: model(t), tree, tokens) == want
    known = len(verify._known)
    assert verify._eval(lambda model, t: model(t), tree, tokens) == want and len(verify._known) == known > 3


def test_a_part_that_was_traced_once_is_traced_again_where_it_changed():
    tree, tokens = families.abstract("llama"), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    verify._eval(lambda model, t: model(t), tree, tokens)
    broken = ir.shallow(tree)
    up = tree.layers[1].mlp.up
    ir.put(broken, "layers/1/mlp/up", ir.replace(up, weight=jax.ShapeDtypeStruct((7, 64), jnp.float32)))
    with pytest.raises(optx.errors.VerifyError, match="logits_unchanged: the model does not run"):
        verify.check(tree, broken, "it", (verify.logits_unchanged,))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_shallow_makes_what_flax_clones(family):
    tree = families.abstract(family)
    mine, flaxs = ir.shallow(tree), nnx.clone(tree, variables=False)
    assert nnx.graphdef(mine) == nnx.graphdef(flaxs) == nnx.graphdef(tree)
    assert all(a is b for a, b in zip(ir.params(tree).values(), ir.params(mine).values(), strict=True))
    assert not {id(m) for _, m in ir.walk(tree)} & {id(m) for _, m in ir.walk(mine)}
    assert ir.describe(mine) == ir.describe(tree) and ir.signature(mine) == ir.signature(flaxs)


def test_a_module_in_two_places_stays_one_and_the_signature_tells():
    one, two = (ir.shallow(families.abstract("llama")) for _ in range(2))
    two.layers[1].norm = ir.shallow(two.layers[0].norm)
    one.layers[1].norm = one.layers[0].norm
    copy = ir.shallow(one)
    assert copy.layers[1].norm is copy.layers[0].norm is not one.layers[0].norm
    assert ir.signature(copy) == ir.signature(one) != ir.signature(two)


def test_a_copy_made_in_a_trace_may_be_changed_there():
    tree = families.abstract("llama")

    def inside(x):
        copy = ir.shallow(tree)
        copy.context = 7
        return x * copy.context

    assert jax.eval_shape(inside, jax.ShapeDtypeStruct((), jnp.float32)).shape == () and tree.context != 7


def test_a_plan_on_shapes_is_the_plan_that_legality_let_pass(keys4):
    recipe, source = Recipe.from_yaml(keys4), from_module(families.abstract("llama", attention_bias=True), "tiny")
    planned = api.on_shapes(source, recipe, "h100")
    judged = {each.name: each for each in legality.judge(recipe, planned.trees)}
    with pytest.raises(optx.errors.LegalityError, match=re.escape(judged["k_bias_low_bit_kv"].where[0])):
        optx.plan(source, recipe, "h100")
    allowed = dataclasses.replace(recipe, allow=("k_bias_low_bit_kv",))
    assert ir.signature(optx.plan(source, allowed, "h100").tree) == ir.signature(planned.tree)
    assert pipeline.run(source.tree, recipe)[1][0].sites == len(judged["k_bias_low_bit_kv"].where)
