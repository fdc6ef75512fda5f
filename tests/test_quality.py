"""What lossy passes cost on calibration text: figures against plain arithmetic, blame against recipes of a single site."""

import dataclasses
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import optx
from optx import ir, quality
from optx.cache import Ragged
from optx.checkpoint.export import how_made
from optx.checkpoint.source import Source, from_module
from optx.errors import QualityError, RecipeError, RequestError
from optx.models import by_hf_type
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.recipe import Recipe

TEXT = "It was the best of times, it was the wörst of times. " * 4
INT4 = QuantizeWeights(format="int4", group=8)
BOTH = Recipe(name="both", weights=[INT4], cache=[QuantizeKV(format="int4")], lower=[FuseProjections()])
TINY = {"num_hidden_layers": 1, "max_position_embeddings": 64}


def source(model, add_bos=True) -> Source:
    return dataclasses.replace(from_module(model), tokenizer=families.tokenizer(add_bos))


@pytest.fixture(scope="module")
def llama():
    return source(families.concrete("llama", **TINY))


@pytest.fixture(scope="module")
def compiled(llama):
    return optx.compile(llama, BOTH, "cpu", calibration=TEXT)


def cost(llama, *rules) -> float:
    """KL of a recipe by `evaluate`, over the windows that a calibration reads."""
    found = optx.compile(llama, Recipe(weights=rules), "cpu")
    return found.evaluate(TEXT, context=64, against=optx.compile(llama, target="cpu")).kl


def test_divergence_is_that_of_eval_against_the_uncompiled_model(llama, compiled):
    weights, kv, fused = (record.quality for record in compiled.plan.records)
    whole = compiled.evaluate(TEXT, context=64, against=optx.compile(llama, target="cpu"))
    assert kv.kl == pytest.approx(whole.kl, rel=1e-3) and kv.kl > 0.001
    assert kv.top1 == pytest.approx(whole.top1, abs=1.5 / whole.tokens) and kv.tokens == whole.tokens
    assert weights.kl == pytest.approx(cost(llama, INT4), rel=1e-3)
    assert fused is None, "an exact pass costs nothing"


def test_the_result_is_that_of_a_streaming_compile(llama, compiled):
    want = optx.compile(llama, BOTH, "cpu").tree
    assert ir.signature(compiled.tree) == ir.signature(want)
    for a, b in zip(*(jax.tree.leaves(nnx.state(tree)) for tree in (compiled.tree, want)), strict=True):
        np.testing.assert_array_equal(a, b)


def relative(pairs) -> float:
    """|y' - y| / |y| over all windows."""
    changed = sum(float(((new - old) ** 2).sum()) for old, new in pairs)
    return (changed / sum(float((old**2).sum()) for old, _ in pairs)) ** 0.5


def test_output_errors_of_weights_are_on_the_inputs_before_the_pass(llama, compiled):
    """Of the first projections and of the head, by hand: x @ W' against x @ W."""
    before = llama.load()
    after = optx.compile(llama, Recipe(weights=[INT4]), "cpu").tree
    errors = compiled.plan.records[0].quality.errors
    assert len(errors) == compiled.plan.records[0].sites == 8
    texts = quality.windows(TEXT, llama)
    assert [w.shape for w in texts] == [(1, 64)] * 3

    def weight(tree, path):
        value = ir.get(tree, path).weight.get_value()
        return np.asarray(value if isinstance(value, jax.Array) else value.dequantize())

    inputs = {
        "layers/0/mixer/q": [before.layers[0].norm(before.embed(w[0])) for w in texts],
        "output": [before.backbone(w[0], Ragged.dense(1, 64))[0] for w in texts],
    }
    for path, xs in inputs.items():
        old, new = weight(before, path), weight(after, path)
        want = relative([(np.asarray(x) @ old, np.asarray(x) @ new) for x in xs])
        assert errors[path] == pytest.approx(want, rel=1e-3) and want > 0.01


def test_output_errors_of_a_cache_are_those_of_the_mixer(llama, compiled):
    """The second pass starts from packed weights; its site gives (output, pool), of which the output counts."""
    before = optx.compile(llama, Recipe(weights=[INT4]), "cpu").tree
    after = optx.compile(llama, dataclasses.replace(BOTH, lower=()), "cpu").tree
    pairs = []
    for w in quality.windows(TEXT, llama):
        x = before.layers[0].norm(before.embed(w[0]))
        pairs.append([np.asarray(t.layers[0].mixer(x, Ragged.dense(1, 64), None)[0]) for t in (before, after)])
    errors = compiled.plan.records[1].quality.errors
    assert errors == {"layers/0/mixer": pytest.approx(relative(pairs), rel=1e-3)}


def test_blame_applied_is_a_recipe_of_that_site_alone(llama):
    plan = optx.plan(llama, Recipe(weights=[INT4]), "cpu")
    found = quality.blame(plan, TEXT)
    assert [kl for _, kl in found] == sorted((kl for _, kl in found), reverse=True) and len(found) == 8
    for path, kl in (found[0], found[-1]):
        alone = dataclasses.replace(INT4, match=path)
        assert kl == pytest.approx(cost(llama, alone), rel=0.01, abs=1e-6)
    assert plan.records[0].errors == {} and plan.records[0].quality is None, "the plan stays as it was"


def test_blame_undone_is_a_recipe_without_that_site(llama, compiled):
    found = quality.blame(compiled.plan, TEXT, step="quantize_weights", how="undone")
    assert [kl for _, kl in found] == sorted(kl for _, kl in found) and len(found) == 8
    for path, kl in (found[0], found[-1]):
        rest = dataclasses.replace(INT4, match=f"(?!{path}$).*")
        assert kl == pytest.approx(cost(llama, rest), rel=0.01)


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "the recipe has 2 lossy passes; name one: step=quantize_weights or quantize_kv"),
        ({"step": "quantize_weight"}, "step='quantize_weight' is no lossy pass of the recipe; did you mean"),
        ({"step": "fuse_projections"}, "step='fuse_projections' is no lossy pass of the recipe"),
        ({"step": "quantize_kv", "how": "twice"}, "how='twice'; allowed: 'applied', 'undone'"),
    ],
)
def test_blame_of_what_is_not_there(llama, options, told):
    with pytest.raises(QualityError, match=told):
        quality.blame(optx.plan(llama, BOTH, "cpu"), TEXT, **options)


def test_every_kind_of_mixer():
    """A projection that its parent contracts itself has no output of its own: the parent stands for it. Layers that read
    another layer's cache see its rounding."""
    model = source(families.hybrid())
    recipe = Recipe(weights=[INT4], cache=[QuantizeKV(match="layers/0/mixer")])
    plan = optx.plan(model, recipe, "cpu")
    sites = {path for path, _ in quality.blame(plan, TEXT[:40], step="quantize_weights")}
    inner = [path for path, module in ir.walk(plan.tree) if type(module).__name__ == "Inner"]
    assert inner and not sites & set(inner) and {path.rpartition("/")[0] for path in inner} <= sites
    assert {"layers/0/mixer/q", "layers/0/mlp/down"} <= sites
    ((path, kl),) = quality.blame(plan, TEXT[:40], step="quantize_kv")
    assert path == "layers/0/mixer" and kl > 0


# Budgets


def test_a_broken_budget_names_pass_figures_and_sites(llama, compiled):
    spent = [record.quality.kl for record in compiled.plan.records[:2]]
    assert spent[0] < spent[1]
    between = sum(spent) / 2
    with pytest.raises(QualityError) as error:
        optx.compile(llama, dataclasses.replace(BOTH, max_kl=between), "cpu", calibration=TEXT)
    told = str(error.value)
    assert told.startswith(
        f"recipe.max_kl: quantize_kv brings the KL to {spent[1]:.4g} nats a token; allowed: {between:.4g}"
    )
    assert f"quantize_weights {spent[0]:.4g}, quantize_kv {spent[1]:.4g}" in told and "layers/0/mixer" in told
    assert error.value.kl == pytest.approx({"quantize_weights": spent[0], "quantize_kv": spent[1]}, rel=1e-6)


def test_the_first_pass_that_breaks_it_stops_the_compile(llama, compiled):
    with pytest.raises(QualityError, match="quantize_weights brings the KL") as error:
        optx.compile(llama, dataclasses.replace(BOTH, max_kl=1e-4), "cpu", calibration=TEXT)
    assert error.value.kl.keys() == {"quantize_weights"} and len(error.value.sites) == 8
    assert error.value.sites == tuple(sorted(error.value.sites, key=lambda site: -site[1]))


def test_numbers_that_are_none_break_a_budget():
    model = families.concrete("llama", **TINY)
    model.layers[0].mixer.q.weight.set_value(jnp.full_like(model.layers[0].mixer.q.weight.get_value(), jnp.inf))
    with pytest.raises(QualityError, match="brings the KL to nan"):
        optx.compile(source(model), dataclasses.replace(BOTH, max_kl=100.0), "cpu", calibration=TEXT)


def test_within_its_budget_a_recipe_compiles(llama, compiled):
    budget = 2 * compiled.plan.records[1].quality.kl
    recipe = dataclasses.replace(BOTH, max_kl=budget)
    assert optx.compile(llama, recipe, "cpu", calibration=TEXT).report.records[1].quality.kl <= budget
    with pytest.raises(RecipeError, match=r"recipe.max_kl: .* there is none; give calibration"):
        optx.compile(llama, recipe, "cpu")
    assert optx.plan(llama, recipe, "cpu").recipe.max_kl == budget, "a plan needs no text"


def test_the_budget_in_yaml(tmp_path):
    path = tmp_path / "budget.yaml"
    path.write_text("max_kl: 0.05\ncache:\n  - {pass: quantize_kv}\n")
    recipe = Recipe.from_yaml(path)
    assert recipe.max_kl == 0.05 and Recipe.from_dict(recipe.to_dict()) == recipe
    assert "max_kl" not in dataclasses.replace(recipe, max_kl=None).to_dict()
    for value, told in (("0", "got 0.0; allowed: a number above 0"), (".nan", "got nan"), ("small", "allowed: float")):
        path.write_text(f"max_kl: {value}\n")
        with pytest.raises(RecipeError, match=f"max_kl: .*{told}"):
            Recipe.from_yaml(path)
    with pytest.raises(RecipeError, match="max_lk: unknown field of Recipe; did you mean 'max_kl'"):
        Recipe.from_dict({"max_lk": 1})


# Report


def test_the_report_shows_it(compiled):
    text = str(compiled.report)
    kv = compiled.plan.records[1].quality
    assert f"quality against the uncompiled model, {kv.tokens} calibration tokens" in text
    assert f"{kv.kl:.6f}" in text and f"{100 * kv.top1:.2f} %" in text
    assert f"quantize_kv changes most the output of: layers/0/mixer {kv.errors['layers/0/mixer']:.4f}" in text
    records = json.loads(json.dumps(compiled.report.to_dict()))["records"]
    assert records[1]["quality"] == {"kl": kv.kl, "top1": kv.top1, "tokens": kv.tokens, "errors": kv.errors}
    assert records[2]["quality"] is None


def test_an_export_keeps_it(tmp_path):
    model = optx.load(tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=1))
    made = optx.compile(model, BOTH, "cpu", calibration=TEXT)
    optx.export(made, tmp_path / "out")
    kept = how_made(tmp_path / "out", by_hf_type).records
    assert [record.quality for record in kept] == [record.quality for record in made.plan.records]
    assert kept[0].quality.kl > 0


def test_without_calibration_nothing_is_measured_or_held(llama, monkeypatch):
    def load(self):
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(Source, "load", load)
    report = optx.compile(llama, BOTH, "cpu").report
    assert [record.quality for record in report.records] == [None] * 3 and "calibration" not in str(report)
    with pytest.raises(AssertionError, match="the whole model"):
        optx.compile(llama, BOTH, "cpu", calibration=TEXT)


def test_a_recipe_without_passes_has_nothing_to_measure(llama):
    assert optx.compile(llama, target="cpu", calibration=TEXT).report.records == ()


# Calibration text


def test_text_and_files(llama, tmp_path):
    path = tmp_path / "some text.txt"
    path.write_text(TEXT, encoding="utf-8")
    want = np.concatenate(quality.windows(TEXT, llama))
    assert want[0, 0] == families.BOS
    for given in (path, str(path)):
        np.testing.assert_array_equal(np.concatenate(quality.windows(given, llama)), want)
    ids = llama.tokenizer.encode("a b", add_special=False)
    np.testing.assert_array_equal(quality.windows("a b", llama)[0], [[families.BOS, *ids]])
    assert len(quality.windows(TEXT * 20, llama)) == quality.WINDOWS


@pytest.mark.parametrize("given", ["nowhere.txt", "no/where at all.txt"], ids=["string", "path"])
def test_a_file_that_is_not_there(llama, given, tmp_path):
    path = tmp_path / given if " " in given else given
    with pytest.raises(RequestError, match=r"calibration: .*no such file or directory"):
        optx.compile(llama, BOTH, "cpu", calibration=path)


def test_texts_that_cannot_be_scored(llama, tmp_path):
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    with pytest.raises(RequestError, match="not UTF-8: byte 0xff at 3"):
        quality.windows(tmp_path / "bytes", llama)
    with pytest.raises(RequestError, match="calibration: .*: cannot be read"):
        quality.windows(tmp_path, llama)
    (tmp_path / "empty").write_text("")
    with pytest.raises(RequestError, match="the text has 0 tokens; at least 1 needed"):
        quality.windows(tmp_path / "empty", llama)
    with pytest.raises(RequestError, match="has no tokenizer"):
        quality.windows(TEXT, dataclasses.replace(llama, tokenizer=None))
    few = source(families.concrete("llama", vocab_size=100, **TINY))
    with pytest.raises(RequestError, match="gave the id [0-9]+; the model has 100 ids"):
        quality.windows(TEXT, few)


def test_a_text_longer_than_a_file_name_may_be_is_a_text(llama):
    text = ("the quick brown fox " * 20).strip()
    assert 255 < len(text) < 1024
    assert sum(w.shape[1] for w in quality.windows(text, llama)) > 20
