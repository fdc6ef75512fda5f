"""Search: costs against plans, losses against compiled recipes, choices against brute force, files read back."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import families
import numpy as np
import pytest
import tiny

import optx
from optx import cli, ir, quality, search_meter, search_text, slo
from optx import search as searching
from optx.checkpoint.source import Source, from_module
from optx.cost import step_bytes
from optx.errors import RecipeError, RequestError, SearchError
from optx.passes.gptq import GPTQ
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.sliding_window import SlidingWindow
from optx.recipe import Recipe
from optx.search import search, space_of
from optx.search_cost import FIGURES, Costs, Limit
from optx.search_meter import NEVER, Ledger, Meter, Sensitivities, sensitivities
from optx.search_solve import budgets, solve
from optx.search_space import GRANULARITIES, LADDER, candidates_of, groups_of, pattern
from optx.target import TARGETS, Target

TEXT = "It was the best of times, it was the wörst of times. " * 4
FORMS = Recipe(
    name="forms",
    weights=[
        QuantizeWeights(format="int8"),
        QuantizeWeights(format="int4", group=8, symmetric=False),
        QuantizeWeights(format="int2", group=8, symmetric=False),
        QuantizeWeights(format="int2", group=16, symmetric=False),
    ],
    cache=[QuantizeKV(format="int8"), QuantizeKV(format="int4")],
)
TINY = {"num_hidden_layers": 2, "max_position_embeddings": 64}
H100 = TARGETS["h100"]


def source(model) -> Source:
    return dataclasses.replace(from_module(model), tokenizer=families.tokenizer(True))


@pytest.fixture(scope="module")
def llama():
    return source(families.concrete("llama", **TINY))


def asked(text: str = "bits<=5", model=None, **options) -> searching.Space:
    return space_of(model, slo.parse(text), H100, **{"candidates": FORMS, "sites": "projection"} | options)


@pytest.fixture(scope="module")
def space(llama):
    return asked(model=llama)


@pytest.fixture(scope="module")
def meter(llama, space):
    return Meter(llama.load(), space.groups, quality.windows(TEXT, llama)[:1])


def some_choices(groups, count, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(int(rng.integers(1 + len(group.forms))) for group in groups) for _ in range(count)]


# Groups and candidates


def names(llama, sites, forms=FORMS):
    return [(group.name, str(group.stage)) for group in groups_of(llama.tree, candidates_of(forms), sites)]


def test_groups_by_granularity(llama):
    layer = [("layers/0", "weights"), ("layers/1", "weights"), ("output", "weights")]
    assert names(llama, "layer") == [*layer, ("layers/0", "cache"), ("layers/1", "cache")]
    kinds = ("mixer/qkv", "mixer/o", "mlp/gate_up", "mlp/down")
    projection = [*((f"layers/0-1/{kind}", "weights") for kind in kinds), ("output", "weights")]
    assert names(llama, "projection") == [*projection, ("layers/0-1/mixer", "cache")]
    both = [(f"layers/{i}/{kind}", "weights") for i in (0, 1) for kind in kinds]
    assert names(llama, "layer+projection") == [
        *both, ("output", "weights"), ("layers/0/mixer", "cache"), ("layers/1/mixer", "cache"),
    ]  # fmt: skip


@pytest.mark.parametrize("sites", GRANULARITIES)
def test_every_site_is_in_one_group(llama, sites):
    groups = groups_of(llama.tree, candidates_of(FORMS), sites)
    found = [path for group in groups for path in group.sites]
    want = [p for p, m in ir.walk(llama.tree) if type(m).__name__ in ("Linear", "Attention")]
    assert sorted(found) == sorted(want)
    every = [path for path, _ in ir.walk(llama.tree)]
    for group in groups:
        assert {path for path in every if re.fullmatch(group.where, path)} == set(group.sites)


def test_patterns_match_their_paths_alone():
    paths = [f"layers/{i}/{kind}" for i in range(12) for kind in ("mixer/q", "mixer/qx", "mlp/up")] + [
        "output",
        "outputs",
    ]
    rng = np.random.default_rng(1)
    for _ in range(20):
        chosen = [path for path in paths if rng.random() < 0.4] or paths[:1]
        where = pattern(chosen, 12)
        assert [path for path in paths if re.fullmatch(where, path)] == chosen
    assert pattern([f"layers/{i}/mixer/q" for i in range(12)], 12) == "layers/[0-9]+/mixer/q"


def test_what_does_not_fit_falls_out(llama):
    """down has 64 inputs, all other projections 32."""
    forms = Recipe(weights=[QuantizeWeights(format="int4", group=64), QuantizeWeights(format="int8", match="output")])
    groups = groups_of(llama.tree, candidates_of(forms), "projection")
    assert [(group.name, len(group.forms)) for group in groups] == [("layers/0-1/mlp/down", 1), ("output", 1)]
    with pytest.raises(RecipeError, match="none of them fits a site"):
        groups_of(llama.tree, candidates_of(Recipe(weights=[QuantizeWeights(format="int4", group=5)])))


def test_a_refusal_of_legality_falls_out():
    biased = families.abstract("llama", attention_bias=True)
    groups = groups_of(biased, candidates_of(FORMS), "projection")
    assert [form.label for form in groups[-1].forms] == ["quantize_kv int8"]


def test_candidates_that_cannot_be_searched(llama):
    both = Recipe(attention=[SlidingWindow(window=8)], cache=[QuantizeKV(format="int8")])
    with pytest.raises(RecipeError, match="stages attention and cache both rewrite layers/0/mixer; search one stage"):
        groups_of(llama.tree, candidates_of(both))
    with pytest.raises(RecipeError, match="forms: holds no pass"):
        candidates_of(Recipe(name="forms"))
    with pytest.raises(RecipeError, match="a candidate stands twice"):
        candidates_of(Recipe(cache=[QuantizeKV(), QuantizeKV()]))


def test_the_ladder_is_legal_on_a_real_shape():
    tree = optx.load("qwen3-8b").tree
    groups = groups_of(tree, candidates_of(LADDER), "projection")
    assert [group.name for group in groups][:2] == ["layers/0-35/mixer/qkv", "layers/0-35/mixer/o"]
    every = {candidate.label for candidate in candidates_of(LADDER)}
    assert {form.label for group in groups for form in group.forms} == every


# Costs


@pytest.mark.parametrize(
    "family, sites", [("llama", "layer+projection"), ("gemma3", "projection"), ("hybrid", "layer")]
)
def test_costs_are_those_of_the_plan(family, sites):
    """Also where layers read another layer's cache."""
    model = families.hybrid() if family == "hybrid" else families.abstract(family)
    found = asked("bits<=16,batch=3,ctx=32", model=model, sites=sites)
    for choice in [found.costs.least("bytes"), *some_choices(found.groups, 1)]:
        plan = optx.plan(model, found.recipe(choice, "some"), H100)
        figures, bounds, step = found.costs.of(choice), plan.estimate(3, 32), step_bytes(plan.tree, 3, 32)
        want = {"tpot": bounds.tpot, "ttft": bounds.ttft, "memory": bounds.held, "bytes": step.total}
        want["weights"] = ir.weight_bytes(plan.tree)
        for name, value in want.items():
            assert figures[name] == pytest.approx(value, rel=1e-9), name


def test_bits_count_scales_over_what_can_be_rewritten(llama, space):
    eight = tuple(1 if group.stage == "weights" else 0 for group in space.groups)
    packed = optx.plan(llama, space.recipe(eight, "eight"), H100).tree
    sites = [packed.output] + [getattr(part, name) for layer in packed.layers for part, names in (
        (layer.mixer, ("qkv", "o")), (layer.mlp, ("gate_up", "down"))) for name in names]  # fmt: skip
    stored, count = sum(map(ir.weight_bytes, sites)), sum(map(ir.weight_count, sites))
    assert space.costs.of(eight)["bits"] == pytest.approx(8 * stored / count, rel=1e-12)
    assert space.costs.of((0,) * len(space.groups))["bits"] == pytest.approx(32)


# What forms lose


def test_the_meter_agrees_with_compiled_recipes(llama, space, meter):
    for choice in some_choices(space.groups, 2):
        want = searching.compiled_kl(llama, space.recipe(choice, "some"), meter.text, meter.base)
        assert meter.kl(choice) == pytest.approx(want, rel=2e-3) and want > 0
    assert meter.kl((0,) * len(space.groups)) == 0


def test_the_meter_takes_every_kind_of_mixer():
    model = source(families.hybrid())
    found = asked("bits<=16", model=model, sites="layer")
    kinds = Meter(model.load(), found.groups, quality.windows(TEXT, model)[:1])
    for choice in (
        found.costs.least("bits"),
        found.costs.least("bytes"),
    ):
        want = searching.compiled_kl(model, found.recipe(choice, "some"), kinds.text, kinds.base)
        assert kinds.kl(choice) == pytest.approx(want, rel=5e-3) and want > 0


def test_a_form_that_another_beats_is_not_measured(space, meter):
    """int2 by groups of 16 is smaller and worse than by groups of 8; int4 twice is one too many."""
    group, sizes = space.groups[0], space.costs.sizes[0]
    errors = np.array([0, *(meter.error(group, index) for index in range(1, 5))])
    assert (np.diff(errors[1:]) > 0).all() and (np.diff(sizes) < 0).all()
    assert not any(search_meter._beaten(group, index, errors, sizes) for index in range(1, 5))
    equal = errors.copy()
    equal[4] = errors[3]
    assert search_meter._beaten(group, 3, equal, sizes) and not search_meter._beaten(group, 4, equal, sizes)


def test_forms_between_measured_ones_follow_from_their_errors(space, meter):
    ledger = Ledger(None, {})
    found = sensitivities(meter, space.costs.sizes, ledger, measured=2)
    names = [name for name in ledger.figures if name.startswith("kl")]
    assert len(names) == 2 * 5 + 2, "two of four forms of weights, and caches in all"
    row, group = found.kl[0], space.groups[0]
    run = [i for i in range(1, 5) if f"kl | {group.where} | {group.form(i).label}" in ledger.figures]
    assert run == [2, 4]
    ratio = meter.error(group, 3) / meter.error(group, 4)
    assert row[3] == pytest.approx(row[4] * ratio**2, rel=1e-6) and np.isfinite(row).all()
    alone = (3, *[0] * (len(space.groups) - 1))
    assert row[3] == pytest.approx(meter.kl(alone), rel=0.5)


def test_calibrated_candidates_come_in_as_data(llama):
    """Alone in its group a calibrated form is what the compiled recipe holds: all before it is as it is there too."""
    forms = Recipe(weights=[GPTQ(format="int4", group=8), QuantizeWeights(format="int4", group=8)])
    found = asked("bits<=16", model=llama, candidates=forms, sites="layer+projection")
    text = quality.windows(TEXT, llama)
    both = Meter(llama.load(), found.groups, text)
    first, rounded = ((form, *[0] * (len(found.groups) - 1)) for form in (1, 2))
    want = searching.compiled_kl(llama, found.recipe(first, "some"), text, both.base, TEXT)
    assert both.kl(first) == pytest.approx(want, rel=0.02) and 0 < want < both.kl(rounded)


# The solver


def random_problem(rng, groups=4, forms=3):
    kl = tuple(np.append(0, rng.exponential(size=forms)) for _ in range(groups))
    kl[0][1] = NEVER
    added = tuple(-np.cumsum(rng.exponential(size=(1 + forms, len(FIGURES))), axis=0) for _ in range(groups))
    for rows in added:
        rows[0] = 0
    base = -sum(rows[-1] for rows in added) + 1
    sizes = tuple(rows[:, 0] for rows in added)
    costs = Costs(target=H100, batch=1, context=1, base=base, added=added, sizes=sizes)
    return Sensitivities(kl=kl), costs


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    found, costs = random_problem(rng)
    limits = [
        Limit(figure=name, most=costs.base[i] * share, said="")
        for i, (name, share) in enumerate([("tpot", rng.uniform(0.2, 0.9)), ("ttft", 0.8)])
    ]
    every = list(itertools.product(*(range(len(row)) for row in found.kl)))
    allowed = [c for c in every if np.isfinite(found.of(c)) and all(limit.within(costs.of(c)) for limit in limits)]
    got = solve(found, costs, limits)
    if not allowed:
        assert got is None
        return
    best = min(map(found.of, allowed))
    assert found.of(got) == pytest.approx(best, abs=1e-6) and all(limit.within(costs.of(got)) for limit in limits)
    most = 1.5 * best + 0.1
    small = solve(found, costs, limits, most_kl=most, least="bytes")
    want = min(costs.of(choice)["bytes"] for choice in allowed if found.of(choice) <= most)
    assert costs.of(small)["bytes"] == pytest.approx(want, rel=1e-6)


def test_brute_force_meets_both_outcomes():
    """The cases above hold some that are feasible, and what is not gives None."""
    found, costs = random_problem(np.random.default_rng(0))
    assert solve(found, costs, [Limit(figure="tpot", most=0.5, said="")]) is None
    assert solve(found, costs, []) == (0, 0, 0, 0)
    values = budgets(costs, "bytes", 4)
    assert values[0] == pytest.approx(costs.of(costs.least("bytes"))["bytes"]) and values[-1] == pytest.approx(
        costs.base[3]
    )


# The whole search


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama", num_hidden_layers=1)


def run(model, out, text="bits<=4.5, kl<=2", **options):
    options = {"candidates": FORMS, "sites": "projection", "points": 3, "windows": 1} | options
    return search(model, slo.parse(text), H100, calibration=tiny.TEXT, out=out, **options)


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "found"
    result = run(checkpoint, out)
    search_text.write(result, out)
    return out, result


def test_the_winner_keeps_the_bounds(found):
    _, result = found
    winner = result.winner
    assert winner in result.front and winner.figures["bits"] <= 4.5 and winner.measured <= 2
    rivals = [point for point in (*result.front, *result.uniform) if point.figures["bits"] <= 4.5]
    assert len(rivals) > 1 and min(point.measured for point in rivals) == winner.measured
    bits = [point.figures["bits"] for point in result.front]
    predicted = [point.predicted for point in result.front]
    assert bits == sorted(bits) and predicted == sorted(predicted, reverse=True) and len(bits) >= 3
    assert predicted[-1] == 0 and abs(result.front[-1].measured) < 1e-6, "the front ends with the model as it is"


def test_every_recipe_is_read_back_and_hits_all_its_rules(checkpoint, found):
    out, result = found
    model = optx.load(checkpoint)
    assert {path.stem for path in out.glob("*.yaml")} == {point.name for point in result.front} | {"winner"}
    for point in result.front:
        recipe = Recipe.from_yaml(out / f"{point.name}.yaml")
        assert recipe == point.recipe
        plan = optx.plan(model, recipe, H100)  # an unused rule is an error
        assert ir.weight_bytes(plan.tree) == pytest.approx(point.figures["weights"])
    assert dataclasses.replace(Recipe.from_yaml(out / "winner.yaml"), name=result.winner.name) == result.winner.recipe


def test_measured_is_what_eval_says(checkpoint, found):
    _, result = found
    compiled = optx.compile(checkpoint, result.winner.recipe, "cpu")
    got = compiled.evaluate(tiny.TEXT, context=256, max_windows=1, against=optx.compile(checkpoint, target="cpu"))
    assert result.winner.measured == pytest.approx(got.kl, rel=1e-3) and result.tokens == got.tokens


def test_files_say_the_same(found):
    out, result = found
    data = json.loads((out / "front.json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(result.to_dict()))
    assert data["winner"]["recipe"] == result.winner.recipe.to_dict() and data["winner"]["bits"] <= 4.5
    page = (out / "front.md").read_text(encoding="utf-8")
    assert page.count(" winner |") == 1 and f"winner: {result.winner.name}" in page
    assert all(f"| {point.name} |" in page for point in (*result.front, *result.uniform))


def test_a_second_run_measures_nothing(checkpoint, found, monkeypatch):
    out, result = found

    def measure(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Meter, "kl", measure)
    monkeypatch.setattr(Meter, "error", measure)
    monkeypatch.setattr(searching, "compiled_kl", measure)
    assert run(checkpoint, out).to_dict() == result.to_dict()


def test_an_interrupted_run_goes_on(checkpoint, found, tmp_path, monkeypatch):
    _, result = found
    real, calls = Meter.kl, []

    def stops(self, choice):
        calls.append(choice)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, choice)

    monkeypatch.setattr(Meter, "kl", stops)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path)
    first = list(calls)
    assert run(checkpoint, tmp_path).winner.recipe == result.winner.recipe
    assert first[3] in calls[4:] and not set(first[:3]) & set(calls[4:])


def test_figures_of_another_text_are_not_mixed(checkpoint, found):
    out, _ = found
    with pytest.raises(
        SearchError, match=r"sensitivities.json: text: was measured with '\w+', now '\w+'; give another --out"
    ):
        search(checkpoint, slo.parse("bits<=4"), H100, calibration=tiny.TEXT.upper(), out=out, windows=1)
    (out.parent / "bad").mkdir()
    (out.parent / "bad" / "sensitivities.json").write_text('{"of": 3}')
    with pytest.raises(SearchError, match="holds no figures of a search"):
        run(checkpoint, out.parent / "bad")


def test_a_bound_on_the_kl_alone_takes_the_fewest_bytes(checkpoint, found, tmp_path):
    out, _ = found
    (tmp_path / "sensitivities.json").write_bytes((out / "sensitivities.json").read_bytes())
    result = run(checkpoint, tmp_path, "kl<=0.1")
    kept = [point for point in result.front if point.measured <= 0.1]
    assert result.figure == "bytes" and len(kept) < len(result.front)
    assert result.winner.figures["bytes"] == min(point.figures["bytes"] for point in kept)
    assert 0.02 < result.winner.measured <= 0.1


def test_far_from_additive_the_winner_is_refined(checkpoint, found, tmp_path, monkeypatch):
    out, result = found
    (tmp_path / "sensitivities.json").write_bytes((out / "sensitivities.json").read_bytes())
    monkeypatch.setattr(searching, "ADDITIVE", 1 + 1e-9)
    refined = run(checkpoint, tmp_path, "bits<=3.5")
    (note,) = refined.notes
    assert "was predicted" in note and "around it" in note
    plain = run(checkpoint, tmp_path, "bits<=3.5", refine=False)
    assert not plain.notes and refined.winner.measured <= plain.winner.measured


# Bad input


@pytest.mark.parametrize(
    "text, told",
    [
        ("tpot<=0.001us", r"slo: tpot<=1e-06 ms cannot be met: the smallest recipe of the candidates reads [\d.]+ kB a step = "
         r"[\de.-]+ ms at 3.\d\d TB/s of h100, [\d.]+x too slow, with batch 1 and 64 tokens of context"),
        ("tok/s>=1e12", r"tok/s>=1e\+12 tokens/s cannot be met: .*x too slow"),
        ("ttft<=0.001us", r"takes [\de.-]+ ms for a prompt of 64 tokens on h100, [\d.e+]+x too slow"),
        ("memory<=20kB, batch=4", r"memory<=20.0 kB cannot be met: .* needs [\d.]+ kB, [\d.]+x too much, with batch 4"),
        ("weights<=20kB", r"weights<=20.0 kB cannot be met: the smallest recipe of the candidates takes [\d.]+ kB"),
        ("bits<=2", r"bits<=2 bits cannot be met: .* takes 3.5 bits, 1.75x too much"),
        ("bits<=2.9, weights<=2kB", r"slo: weights<=2.00 kB|slo: weights<=2.0 kB cannot be met"),
        ("bits<=5, ctx=128k", "ctx=131,072 cannot be met: LlamaForCausalLM has a context of 64 tokens|ctx=131,072 cannot be"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_told_before_weights_are_read(llama, text, told, monkeypatch):
    monkeypatch.setattr(Source, "load", lambda self: pytest.fail("weights were read"))
    with pytest.raises(SearchError, match=told):
        search(llama, slo.parse(text), H100, calibration=TEXT, candidates=FORMS)


def test_the_memory_of_the_target_is_a_bound(llama):
    small = dataclasses.replace(H100, name="small", memory=1000)
    with pytest.raises(SearchError, match="memory of small, 1.0 kB cannot be met"):
        search(llama, slo.parse("bits<=5"), small, calibration=TEXT)


def test_a_bound_on_what_the_target_does_not_tell(llama):
    bare = Target(name="bare", platform="cpu", arch="any")
    with pytest.raises(SearchError, match="the target bare does not tell its bandwidth; name another --target"):
        search(llama, slo.parse("tpot<=5ms"), bare, calibration=TEXT)
    with pytest.raises(SearchError, match="no candidate rewrites weights"):
        search(llama, slo.parse("bits<=5"), H100, calibration=TEXT, candidates=Recipe(cache=[QuantizeKV()]))


def test_a_kl_that_no_recipe_within_the_bounds_keeps(checkpoint, found, tmp_path):
    out, _ = found
    (tmp_path / "sensitivities.json").write_bytes((out / "sensitivities.json").read_bytes())
    result = run(checkpoint, tmp_path, "bits<=4.5, kl<=1e-6")
    assert result.winner is None
    told = search_text.missed(result)
    assert re.search(
        r"kl<=1e-06 cannot be met: .* within bits<=4.5 bits, memory of h100, \S+ GB costs \S+ nats, \S+x", told
    )
    assert "the smallest that keeps it has bits 32" in told
    search_text.write(result, tmp_path)
    assert not (tmp_path / "winner.yaml").exists() and (tmp_path / "point1.yaml").exists()


def test_a_config_without_weights(checkpoint):
    told = "tiny-llama is a config without weights, and sensitivities are measured on weights; give a checkpoint"
    with pytest.raises(SearchError, match=told):
        search(checkpoint / "config.json", slo.parse("tpot<=5ms"), H100, calibration=TEXT, sites="projection")


def test_without_text_or_after_a_compile(llama, checkpoint, tmp_path):
    with pytest.raises(RequestError, match="sensitivities are measured on a text; give calibration"):
        search(llama, slo.parse("bits<=5"), H100, calibration=None)
    optx.export(optx.compile(checkpoint, Recipe(cache=[QuantizeKV()]), "cpu"), tmp_path / "out")
    with pytest.raises(SearchError, match="was compiled with 'recipe'; search the original model"):
        search(tmp_path / "out", slo.parse("bits<=5"), H100, calibration=TEXT)


# The command line


def test_the_command_line(checkpoint, tmp_path):
    text, forms = tmp_path / "text.txt", tmp_path / "forms.yaml"
    text.write_text(tiny.TEXT, encoding="utf-8")
    forms.write_text(dataclasses.replace(FORMS, cache=()).to_yaml())
    arguments = [
        "search",
        checkpoint,
        "--target",
        "h100",
        "--slo",
        "bits<=4.5, ctx=128",
        "--calibration",
        text,
        "--json",
    ]
    arguments += ["--candidates", forms, "--sites", "projection", "--points", "2", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "optx", *map(str, arguments)], capture_output=True, text=True, timeout=500
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    data = json.loads(done.stdout)
    assert data["winner"]["bits"] <= 4.5 and data["target"] == "h100" and data["context"] == 128
    winner = Recipe.from_yaml(tmp_path / "out" / "winner.yaml")
    assert ir.weight_bytes(optx.plan(checkpoint, winner, H100).tree) == data["winner"]["weights"]


@pytest.mark.parametrize(
    "arguments, code, told",
    [
        (["--slo", "tpto<=5ms"], 2, "did you mean 'tpot'?"),
        ([], 2, "--slo SLO is missing"),
        (["--slo", "tpot<=5ms", "--sites", "layers"], 2, "did you mean 'layer'?"),
        (["--slo", "tpot<=5ms", "--target", "h1000"], 1, "target 'h1000' is not known; did you mean 'h100'?"),
        (["--slo", "tpot<=0.001us", "--target", "h100"], 1, "x too slow"),
        (["--slo", "tpot<=100ms", "--target", "h100"], 1, "tiny-llama is a config without weights"),
    ],
)
def test_a_wrong_command_line(checkpoint, capsys, arguments, code, told):
    assert cli.run(["search", str(checkpoint / "config.json"), "--sites", "projection", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and told in err
