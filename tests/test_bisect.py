"""`--bisect`: the pass and the sites that cost most, against compiles of such recipes, and edits that keep the budget."""

import dataclasses
import json

import families
import jax.numpy as jnp
import pytest
import tiny
import yaml

import optx
from optx import bisect, cli, ir
from optx.checkpoint.source import Source, from_module
from optx.errors import QualityError, RequestError
from optx.passes.fuse_projections import FuseProjections
from optx.passes.gptq import GPTQ
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.sliding_window import SlidingWindow
from optx.recipe import Recipe

TEXT = "It was the best of times, it was the wörst of times. " * 3
WORST = ("layers/0/mlp/down", "layers/0/mixer/v")
ONE = {"num_hidden_layers": 1, "max_position_embeddings": 64}
INT2 = [
    QuantizeWeights(format="int2", group=8, match="|".join(WORST)),
    QuantizeWeights(format="int8", match="layers/.*"),
]
BOTH = Recipe(name="both", weights=INT2, cache=[QuantizeKV()], lower=[FuseProjections()])


def source(model) -> Source:
    return dataclasses.replace(from_module(model), tokenizer=families.tokenizer(True))


@pytest.fixture(scope="module")
def llama():
    return source(families.concrete("llama", **ONE))


@pytest.fixture(scope="module")
def found(llama):
    return bisect.bisect(llama, BOTH, TEXT)


def cost(llama, recipe) -> float:
    """KL of a recipe by `evaluate`, over the windows that a calibration reads."""
    compiled = optx.compile(llama, dataclasses.replace(recipe, max_kl=None), "cpu")
    return compiled.evaluate(TEXT, context=64, against=optx.compile(llama, target="cpu")).kl


def test_the_worst_pass_comes_first_with_what_is_left_without_it(llama, found):
    assert found.kl == pytest.approx(cost(llama, BOTH), rel=1e-3)
    assert [(each.name, each.sites) for each in found.passes] == [("quantize_weights", 7), ("quantize_kv", 1)]
    for each, rest in zip(found.passes, ({"weights": ()}, {"cache": ()}), strict=True):
        assert each.without == pytest.approx(cost(llama, dataclasses.replace(BOTH, **rest)), rel=1e-3)
    assert found.edit is None and found.budget is None, "no budget, no edit"


def test_the_worst_sites_come_first(llama, found):
    assert found.culprit == "quantize_weights" and len(found.sites) == 7
    assert {path for path, _ in found.sites[:2]} == set(WORST)
    damage = [kl for _, kl in found.sites]
    assert damage == sorted(damage) and damage[0] < found.first / 1.2
    one = bisect.bisect(llama, dataclasses.replace(BOTH, cache=()), TEXT[:40])
    path, without = one.sites[0]
    rest = dataclasses.replace(
        BOTH, cache=(), weights=[dataclasses.replace(r, match=bisect._but([path], r.match)) for r in INT2]
    )
    compiled = optx.compile(llama, rest, "cpu").evaluate(
        TEXT[:40], context=64, against=optx.compile(llama, target="cpu")
    )
    assert without == pytest.approx(compiled.kl, rel=1e-3)


def test_the_edit_leaves_out_as_little_as_the_budget_needs(llama, found):
    """Between the recipe without both and that without one of the bad sites lies a budget that both must go for."""
    without = [cost(llama, leaving_out(*paths)) for paths in ((WORST[0],), (WORST[1],), WORST)]
    assert without[2] < min(without[:2]) < found.kl
    budget = (without[2] + min(without[:2])) / 2
    edit = bisect.bisect(llama, dataclasses.replace(BOTH, max_kl=budget), TEXT).edit
    assert set(edit.sites) == set(WORST) and edit.passes == () and edit.of == 7
    assert edit.kl <= budget and edit.kl == pytest.approx(cost(llama, edit.recipe), rel=1e-3)
    assert len(edit.recipe.weights) == 1, "a rule whose sites all go is gone"
    assert edit.recipe.lower == BOTH.lower and edit.recipe.max_kl == budget
    enough = max(without[:2]) * 1.01
    alone = bisect.bisect(llama, dataclasses.replace(BOTH, max_kl=enough), TEXT).edit
    assert len(alone.sites) == 1 and alone.kl <= enough and len(alone.recipe.weights) == 2


def leaving_out(*paths):
    return bisect._narrow(families.abstract("llama", **ONE), BOTH, "quantize_weights", paths)


def test_an_edited_recipe_reads_back_and_compiles_within_its_budget(llama, found):
    budget = found.kl / 2
    edit = bisect.bisect(llama, dataclasses.replace(BOTH, max_kl=budget), TEXT).edit
    again = Recipe.from_dict(yaml.safe_load(edit.recipe.to_yaml()))
    assert again == edit.recipe
    records = optx.compile(llama, again, "cpu", calibration=TEXT).report.records
    assert records[1].quality.kl == pytest.approx(edit.kl, rel=1e-3) and records[1].quality.kl <= budget
    dense = [
        path
        for path, v in ir.params(optx.plan(llama, again, "cpu").trees[1]).items()
        if "mixer" in path or "mlp" in path
    ]
    assert {f"{path}/weight" for path in edit.sites} <= set(dense)


def test_a_budget_below_every_pass_leaves_out_passes(llama, found):
    budget = found.passes[0].without / 3  # what the cheap pass alone costs is too much too
    edit = bisect.bisect(llama, dataclasses.replace(BOTH, max_kl=budget), TEXT).edit
    assert edit.passes == ("quantize_weights",) and edit.recipe.weights == () and edit.kl <= budget
    assert edit.sites == ("layers/0/mixer",) and edit.recipe.cache == (), "of one site nothing is left"


def test_a_budget_that_is_kept_asks_for_no_edit(llama, found):
    kept = bisect.bisect(llama, dataclasses.replace(BOTH, max_kl=2 * found.kl), TEXT)
    assert kept.edit is None and kept.kl == found.kl and kept.budget == 2 * found.kl


def test_a_model_that_gives_no_numbers_is_not_blamed_on_passes():
    model = families.concrete("llama", **ONE)
    q = model.layers[0].mixer.q
    q.weight.set_value(jnp.full_like(q.weight.get_value(), jnp.inf))
    with pytest.raises(QualityError, match="bisect: the KL is nan without any pass: module itself gives no numbers"):
        bisect.bisect(source(model), Recipe(cache=[QuantizeKV()], max_kl=1.0), TEXT[:40])


def test_sites_of_every_kind_of_mixer():
    """A module that the forward does not call alone is switched with the one around it, and named so."""
    model = source(families.hybrid())
    recipe = Recipe(
        weights=[QuantizeWeights(format="int4", group=4, match="layers/3/(mixer/.*|mlp/down)")], max_kl=1e-6
    )
    found = bisect.bisect(model, recipe, TEXT[:40])
    assert [path for path, _ in found.sites if path.startswith("layers/3/mixer")] == ["layers/3/mixer"]
    assert found.edit.kl <= 1e-6


def test_windows_are_bisected_too(llama):
    recipe = Recipe(attention=[SlidingWindow(window=4)], cache=[QuantizeKV()], max_kl=1e-4)
    found = bisect.bisect(llama, recipe, TEXT)
    assert found.passes[0].name == "sliding_window" and found.edit.kl <= 1e-4
    assert found.edit.recipe.attention == ()


def test_a_calibrated_pass_is_bisected_on_what_it_makes_of_the_text(llama):
    recipe = Recipe(weights=[GPTQ(format="int2", group=8, match="layers/.*")], cache=[QuantizeKV()])
    whole = bisect.bisect(llama, recipe, TEXT[:60])
    assert whole.passes[0].name == "gptq" and whole.passes[0].without < whole.kl
    budget = whole.kl * 0.7
    edit = bisect.bisect(llama, dataclasses.replace(recipe, max_kl=budget), TEXT[:60]).edit
    records = optx.compile(llama, edit.recipe, "cpu", calibration=TEXT[:60]).report.records
    assert records[-1].quality.kl == pytest.approx(edit.kl, rel=1e-3) and edit.kl <= budget


@pytest.mark.parametrize("rules", [{}, {"lower": [FuseProjections()]}], ids=["none", "exact"])
def test_a_recipe_without_a_lossy_pass(llama, rules):
    with pytest.raises(QualityError, match="bisect: .* has no lossy pass"):
        bisect.bisect(llama, Recipe(**rules), TEXT)


def test_a_text_that_cannot_be_scored(llama):
    with pytest.raises(RequestError, match="calibration: .*no such file"):
        bisect.bisect(llama, BOTH, "nowhere.txt")


# The command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model, recipe, text)."""
    folder = tmp_path_factory.mktemp("bisect")
    (folder / "recipe.yaml").write_text(
        "max_kl: 1.0e-5\nweights:\n  - {pass: quantize_weights, format: int4, group: 16}\n"
    )
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return tiny.checkpoint(folder / "tiny", num_hidden_layers=1), folder / "recipe.yaml", folder / "text.txt"


@pytest.fixture
def compile_(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = cli.run(["compile", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


def test_the_command_ranks_and_proposes_what_the_json_says(compile_, files):
    model, recipe, text = files
    arguments = [model, "--recipe", recipe, "--calibration", text, "--bisect"]
    code, out, err = compile_(*arguments)
    assert (code, err) == (0, "")
    data = json.loads(compile_(*arguments, "--json")[1])
    assert f"KL {data['kl']:.6f} nats a token" in out and "max_kl 1e-05 is broken" in out
    assert out.index("quantize_weights") < out.index(data["sites"][0][0])
    assert f"measured so: KL {data['edit']['kl']:.6f}" in out and data["edit"]["kl"] <= 1e-5
    proposed = out.split("\n\n")[-1]
    assert yaml.safe_load(proposed) == data["edit"]["recipe"]


def test_wrong_command_lines(compile_, files, tmp_path):
    model, recipe, text = files
    code, out, err = compile_(model, "--recipe", recipe, "--bisect")
    assert (code, out) == (2, "") and "compile --bisect: --calibration FILE is missing" in err
    code, _, err = compile_(model, "--recipe", recipe, "--calibration", text, "--bisect", "--out", tmp_path / "x")
    assert code == 2 and "--out says nothing here" in err and not (tmp_path / "x").exists()
    code, _, err = compile_(model, "--recipe", "fused", "--calibration", text, "--bisect")
    assert code == 2 and "no pass here is lossy (fuse_projections)" in err
    code, _, err = compile_(model, "--recipe", recipe)
    assert code == 2 and "--out DIR is missing" in err
