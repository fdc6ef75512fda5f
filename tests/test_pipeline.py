"""The pipeline: rules find their sites, the verifier stops broken passes, a plan reads no weight, records tell all."""

import dataclasses
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optx
from optx import ir, legality, pipeline, registry, tensor, verify
from optx.cache import Stream
from optx.checkpoint.source import from_module
from optx.errors import CheckpointError, LegalityError, OptxError, PassError, RecipeError, VerifyError
from optx.formats import Int
from optx.nn import Attention, Embed, GatedMLP, Linear, RMSNorm
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.sliding_window import SlidingWindow
from optx.pipeline import Instrument
from optx.recipe import Recipe
from optx.registry import Axis, PassOptions, Skipped, Stage, register

INT8, INT4 = Int(width=8), Int(width=4, group=8)
MLP = ("gate", "up", "down")


@pytest.fixture
def passes(monkeypatch):
    """Passes that a test registers are gone after it."""
    monkeypatch.setattr(registry, "PASSES", dict(registry.PASSES))


@pytest.fixture
def make(passes):
    """make(function, ...) registers a pass over `function(site, module, options)` and gives its options class."""

    def make(function, module=Linear, *, name="broken", stage=Stage.WEIGHTS, axis=Axis.BITS):
        options = dataclasses.make_dataclass(
            name, [], bases=(PassOptions,), frozen=True, kw_only=True, namespace={"__hash__": object.__hash__}
        )
        function.__annotations__ = {function.__code__.co_varnames[1]: module}
        register(name, axis=axis, stage=stage, options=options, exact=False)(function)
        return options

    return make


@pytest.fixture(scope="module")
def model():
    return families.concrete("llama")


def plan(model, **stages):
    return optx.plan(model, Recipe(name="test", **stages), target="cpu")


def formats(tree) -> dict[str, str]:
    return {path: ir.tensor_text(v.get_value()).split("[")[0] for path, v in ir.params(tree).items()}


# Rules.


def test_a_rule_matches_whole_paths_and_the_first_wins(model):
    got = formats(
        plan(
            model,
            weights=[
                QuantizeWeights(match=".*/down", format="int8"),
                QuantizeWeights(match="layers/0/.*", format="int4", group=8),
                QuantizeWeights(match="layers/1/mixer/[qk]", format="int2", group=8),
            ],
        ).tree
    )
    packed = {path.removesuffix("/weight"): text for path, text in got.items() if text != "f32"}
    parts = [*(f"mixer/{name}" for name in "qkvo"), "mlp/gate", "mlp/up"]
    assert packed == {
        **{f"layers/{i}/mlp/down": "int8" for i in (0, 1)},
        **{f"layers/0/{part}": "int4_g8" for part in parts},
        **{f"layers/1/mixer/{part}": "int2_g8" for part in "qk"},
    }


def test_a_rule_without_match_takes_every_site_of_the_type(model):
    tree = plan(model, weights=[QuantizeWeights(format="int8")]).tree
    linears = {path for path, module in ir.walk(tree) if isinstance(module, Linear)}
    assert {path for path, text in formats(tree).items() if text == "int8"} == {f"{path}/weight" for path in linears}
    assert "output" in linears


SITES = ", ".join([*(f"layers/N/mixer/{name}" for name in "qkvo"), *(f"layers/N/mlp/{n}" for n in MLP), "output"])


@pytest.mark.parametrize(
    "rules, told",
    [
        (
            [QuantizeWeights(format="int8", match="layers/0/mixer")],
            "recipe.weights[0].match: 'layers/0/mixer' matched no site of quantize_weights; "
            f"sites (N an index): {SITES}",
        ),
        (
            [QuantizeWeights(format="int8"), QuantizeWeights(format="int4", match=".*/down")],
            "recipe.weights[1]: unused, earlier rules of quantize_weights take all its sites (layers/0/mlp/down, ...); "
            "narrow their 'match', or take it out",
        ),
        (
            [QuantizeWeights(format="int8"), QuantizeWeights(format="int4", match="(down")],
            "recipe.weights[1].match: '(down' is no regular expression: "
            "missing ), unterminated subpattern at position 0",
        ),
    ],
    ids=["unused", "shadowed", "no regex"],
)
def test_a_rule_that_does_nothing_is_an_error(model, rules, told):
    with pytest.raises(RecipeError) as error:
        plan(model, weights=rules)
    assert str(error.value) == told


def test_a_pass_without_sites_in_the_model_is_an_error(make):
    options = make(lambda site, module, opt: module, nnx.Conv)
    with pytest.raises(RecipeError, match=r"recipe.weights\[0\]: broken has no site in this model \(it takes Conv\)"):
        plan(families.abstract("llama"), weights=[options()])


def test_a_pass_that_skipped_every_site_is_an_error(model):
    with pytest.raises(PassError, match="sliding_window changed nothing: layer not listed") as error:
        plan(model, attention=[SlidingWindow(window=4, layers=(0,), match="layers/1/.*")])
    assert isinstance(error.value, OptxError)


def test_children_are_rewritten_before_their_parents(make):
    seen = []

    def watch(site, module, opt):
        seen.append(site.path)
        if isinstance(module, GatedMLP):
            assert tensor.is_qtensor(module.down.weight.get_value()), "a parent sees rewritten children"
            return ir.replace(module, activation="relu")
        return ir.replace(module, weight=tensor.quantize(module.weight.get_value(), INT8))

    options = make(watch, Linear | GatedMLP)
    tree = plan(families.abstract("llama"), weights=[options(match="layers/1/mlp.*")]).tree
    assert seen[-1] == "layers/1/mlp" and set(seen) == {
        "layers/1/mlp",
        *(f"layers/1/mlp/{n}" for n in MLP),
    }
    assert tree.layers[1].mlp.activation == "relu" and tree.layers[0].mlp.activation == "silu"


def test_a_site_knows_its_layer(make):
    seen = {}

    def watch(site, module, opt):
        seen[site.path] = site.layer, site.layers
        return ir.replace(module, eps=1e-3)

    plan(families.abstract("llama"), weights=[make(watch, RMSNorm)()])
    assert seen == {"norm": (None, 2)} | {f"layers/{i}/{n}": (i, 2) for i in (0, 1) for n in ("norm", "mlp_norm")}


def test_a_users_pass_runs_after_ours_in_its_stage(make):
    options = make(lambda site, module, opt: ir.replace(module, bias=module.bias), name="aaa_user")
    recipe = Recipe(weights=[options(), QuantizeWeights(format="int8")])
    assert [pass_.name for pass_, _ in recipe.steps()] == ["quantize_weights", "aaa_user"]


def test_a_name_is_registered_once(make):
    make(lambda site, module, opt: module, name="twice")
    with pytest.raises(RecipeError, match="'twice' is registered twice"):
        make(lambda site, module, opt: module, name="twice")


# Out of place.


def test_the_input_stays_as_it_was(model):
    before = ir.describe(model), families.parameters(model)
    planned = plan(
        model,
        attention=[SlidingWindow(window=4)],
        weights=[QuantizeWeights(format="int8")],
        cache=[QuantizeKV()],
        lower=[FuseProjections()],
    )
    optx.compile(model, planned.recipe)
    assert ir.describe(model) == before[0]
    for path, value in families.parameters(model).items():
        np.testing.assert_array_equal(value, before[1][path])
    assert ir.describe(planned.trees[0]) == before[0] and len(planned.trees) == 5


def test_a_pass_that_writes_into_its_input_is_caught(model, make):
    def write(site, linear, opt):
        linear.weight.set_value(tensor.lift(lambda w: 2 * w, linear.weight.get_value()))
        return linear

    options = make(write)
    with pytest.raises(
        VerifyError, match=r"broken wrote into its input at layers/0/mixer/q/weight; passes only construct"
    ):
        plan(ir.abstract(model), weights=[options()])


def test_a_pass_that_writes_only_into_arrays_is_caught_as_they_stream(make):
    def write(site, linear, opt):
        if isinstance(linear.weight.get_value(), jax.Array):
            linear.weight.set_value(2 * linear.weight.get_value())
        return ir.replace(linear, bias=None)

    options = make(write)
    with pytest.raises(VerifyError, match="broken wrote into its input at mixer/q/weight"):
        optx.compile(families.concrete("llama"), Recipe(weights=[options(match="layers/.*")]))


# The verifier: for each rule, a pass that breaks it.


def broken_parts(site, linear, opt):
    good = tensor.quantize(linear.weight.get_value(), INT4)
    return ir.replace(linear, weight=dataclasses.replace(good, scale=good.data))


def missing_scale(site, linear, opt):
    good = tensor.quantize(linear.weight.get_value(), INT4)
    return ir.replace(linear, weight=dataclasses.replace(good, scale=None))


def loose_array(site, linear, opt):
    copy = ir.shallow(linear)
    copy.extra = jnp.ones(3)
    return copy


def loose_list(site, linear, opt):
    copy = ir.shallow(linear)
    copy.extra = [1, 2]
    return copy


def untie(site, mlp, opt):
    weight = tensor.lift(lambda w: w + 0, mlp.up.weight.get_value())
    return ir.replace(mlp, up=ir.replace(mlp.up, weight=weight))


def wider(site, linear, opt):
    return ir.replace(linear, weight=tensor.lift(lambda w: jnp.pad(w, ((0, 0), (0, 1))), linear.weight.get_value()))


def halve_embedding(site, embed, opt):
    return ir.replace(embed, table=tensor.lift(lambda w: w[:, ::2], embed.table.get_value()))


class Recasts(Attention):
    """Its cache comes back in another dtype than it went in."""

    def __call__(self, x, ragged, view):
        y, pool = super().__call__(x, ragged, view)
        return y, {name: value.astype(jnp.bfloat16) for name, value in pool.items()}


class Grows(Attention):
    """Its cache comes back with one more stream."""

    def __call__(self, x, ragged, view):
        y, pool = super().__call__(x, ragged, view)
        return y, pool | {"extra": x}


def as_class(cls):
    def change(site, attn, opt):
        copy = ir.shallow(attn)
        other = object.__new__(cls)
        vars(other).update(vars(copy))
        return other

    return change


BROKEN = {
    "qtensor parts": (broken_parts, Linear, "qtensors_fit", r"layers/0/mixer/q/weight: int4_g8 needs scale\[32, 4\]"),
    "qtensor without scale": (missing_scale, Linear, "qtensors_fit", "layers/0/mixer/q/weight: int4_g8 needs a scale"),
    "array outside": (loose_array, Linear, "arrays_in_variables", "layers/0/mixer/q/extra: an array outside nnx.Param"),
    "unhashable": (loose_list, Linear, "specs_frozen", "layers/0/mixer/q/extra: list cannot be hashed"),
    "untied": (untie, GatedMLP, "sharing_unchanged", "layers/0/mlp/gate/weight, layers/0/mlp/up/weight: shared"),
    "logits shape": (wider, Linear, "logits_unchanged", "logits were .*264.* are .*265"),
    "forward fails": (halve_embedding, Embed, "logits_unchanged", "the model does not run: "),
    "cache dtype": (as_class(Recasts), Attention, "caches_fixpoint", r"caches.*'k'.*: f32.* goes in, bf16.* comes out"),
    "cache structure": (as_class(Grows), Attention, "caches_fixpoint", "caches change structure"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_the_verifier_stops_a_broken_pass(case, make):
    function, module, rule, told = BROKEN[case]
    tree = families.abstract("llama")
    for layer in tree.layers:
        layer.mlp.up.weight = layer.mlp.gate.weight
    options = make(function, module)
    match = "output" if case == "logits shape" else None
    with pytest.raises(VerifyError, match=f"^after broken: {rule}: {told}"):
        plan(tree, weights=[options(match=match)])


def test_every_rule_of_the_verifier_is_broken_above():
    assert {rule.__name__ for rule in verify.RULES} == {rule for _, _, rule, _ in BROKEN.values()}


def test_the_verifier_accepts_what_is_whole():
    for tree in (families.abstract("gemma3"), families.hybrid()):
        verify.check(tree, ir.shallow(tree), "nothing")


def test_sharing_may_end_where_one_of_the_two_is_gone(make):
    tree = families.abstract("llama")
    mlp = tree.layers[0].mlp
    mlp.up.weight = mlp.gate.weight
    smaller = ir.shallow(tree)
    ir.put(smaller, "layers/0/mlp", Linear(families.D, families.D))
    assert verify.sharing_unchanged(tree, smaller) is None


# Abstract and concrete forms.


def test_a_pass_that_looks_at_numbers_differs_from_its_plan(make):
    def by_size(site, linear, opt):
        weight = linear.weight.get_value()
        large = isinstance(weight, jax.Array) and float(jnp.abs(weight).max()) > 0
        return ir.replace(linear, weight=tensor.quantize(weight, INT8 if large else INT4))

    options = make(by_size)
    with pytest.raises(VerifyError, match="after broken at layers/0: weights differ in form from the plan") as error:
        optx.compile(families.concrete("llama"), Recipe(weights=[options(match="layers/.*")]))
    assert "int4_g8" in str(error.value) and "int8" in str(error.value)


def test_a_concrete_pass_is_verified_block_by_block(make):
    def breaks_late(site, linear, opt):
        weight = tensor.quantize(linear.weight.get_value(), INT4)
        if isinstance(weight.data, jax.Array):
            weight = dataclasses.replace(weight, scale=weight.scale[..., :1])
        return ir.replace(linear, weight=weight)

    options = make(breaks_late)
    with pytest.raises(VerifyError, match="after broken at layers/1: qtensors_fit: mlp/up/weight"):
        optx.compile(families.concrete("llama"), Recipe(weights=[options(match="layers/1/mlp/up")]))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_compiled_tree_has_the_form_of_the_plan(family):
    recipe = Recipe(
        attention=[SlidingWindow(window=4, layers=(0,))],
        weights=[QuantizeWeights(match="layers/.*", format="int4", group=8, symmetric=False)],
        cache=[QuantizeKV(format="fp8_e4m3")],
        lower=[FuseProjections()],
    )
    compiled = optx.compile(families.concrete(family), recipe)
    plain = ir.shallow(compiled.tree)
    for _, module in ir.walk(plain):
        if hasattr(module, "choices"):
            module.choices = ()
    assert not ir.is_abstract(plain)
    assert ir.signature(plain) == ir.signature(compiled.plan.tree)


def test_a_shared_parameter_is_read_once_and_stays_shared():
    model = families.concrete("llama")
    model.layers[0].mlp.up.weight = model.layers[0].mlp.gate.weight
    compiled = optx.compile(model)
    assert ir.aliases(compiled.tree) == {frozenset({"layers/0/mlp/gate/weight", "layers/0/mlp/up/weight"})}
    assert ir.weight_bytes(compiled.tree) == ir.weight_bytes(model)


def test_planning_reads_no_weight(model):
    def read(path):
        raise AssertionError(f"{path} was read")

    source = dataclasses.replace(from_module(model), read=read)
    recipe = Recipe.from_yaml("int4_kv8")
    recipe = dataclasses.replace(recipe, weights=[dataclasses.replace(recipe.weights[0], group=8)])
    planned = optx.plan(source, recipe, target="h100")
    str(planned), json.dumps(planned.to_dict()), ir.describe(planned.tree)
    assert ir.is_abstract(planned.tree) and len(planned.records) == 3
    with pytest.raises(AssertionError, match="was read"):
        optx.compile(source, recipe, target="cpu")


def test_what_has_shapes_only_is_planned_and_not_compiled():
    tree = families.abstract("llama")
    assert plan(tree, cache=[QuantizeKV()]).records
    with pytest.raises(CheckpointError, match="CausalLM: embed/table is a shape without numbers"):
        optx.compile(tree)


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(
        PassError, match="Linear lacks backbone, head, layers, cache_plan, context; build on optx.nn.CausalLM"
    ):
        optx.plan(Linear(4, 4))


# Instruments and records.


def full_recipe():
    return Recipe(
        name="full",
        attention=[SlidingWindow(window=4, layers=(0,))],
        weights=[QuantizeWeights(match="layers/.*", format="int8")],
        cache=[QuantizeKV()],
        lower=[FuseProjections()],
    )


def test_dump_writes_a_file_a_pass(model, tmp_path):
    compiled = optx.compile(model, full_recipe(), dump=tmp_path / "dump")
    names = ["input", "sliding_window", "quantize_weights", "quantize_kv", "fuse_projections"]
    files = sorted((tmp_path / "dump").iterdir())
    assert [file.name for file in files] == [f"{i:02d}_{name}.txt" for i, name in enumerate(names)]
    for file, tree in zip(files, compiled.plan.trees, strict=True):
        assert file.read_text().endswith(ir.describe(tree))
    for file, record in zip(files[1:], compiled.plan.records, strict=True):
        assert (
            record.diff and file.read_text() == f"{record.diff}\n{ir.describe(compiled.plan.trees[record_index(file)])}"
        )


def record_index(file) -> int:
    return int(file.name[:2])


def test_a_dump_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptxError, match=r"file: cannot be written"):
        optx.compile(model, full_recipe(), dump=tmp_path / "file")


def test_instruments_see_every_pass_in_order(model):
    seen = []

    class Watch(Instrument):
        def after_pass(self, index, record, before, after):
            seen.append((index, record.name, ir.diff(before, after) == record.diff))

    optx.plan(model, full_recipe(), "cpu", [Watch(), Watch()])
    names = ["sliding_window", "quantize_weights", "quantize_kv", "fuse_projections"]
    assert seen == [(i, name, True) for i, name in enumerate(names, 1) for _ in range(2)]


def test_records_count_sites_bytes_and_errors(model):
    compiled = optx.compile(model, full_recipe())
    window, weights, kv, fuse = records = compiled.plan.records
    assert [r.sites for r in records] == [1, 14, 2, 4]
    assert window.skipped == {"layers/1/mixer": "layer not listed"} and not weights.skipped
    assert [(r.stage, r.axis, r.exact) for r in records] == [
        ("attention", "reads", False),
        ("weights", "bits", False),
        ("cache", "bits", False),
        ("lower", "layout", True),
    ]
    for earlier, later in zip(records, records[1:]):
        assert earlier.weight_bytes[1] == later.weight_bytes[0] and earlier.cache_bytes[1] == later.cache_bytes[0]
    d, f, kv_width = families.D, 64, 16
    matrices = 2 * (2 * d * d + 2 * d * kv_width + 3 * d * f)
    outputs = 2 * (2 * d + 2 * kv_width + 2 * f + d)
    assert weights.weight_bytes == (ir.weight_bytes(model), ir.weight_bytes(model) - 3 * matrices + 2 * outputs)
    assert weights.weight_bytes[1] == ir.weight_bytes(compiled.tree)
    assert kv.cache_bytes == (2 * 2 * kv_width * 4, 2 * 2 * (kv_width + 2 * 2))
    for r in (window, kv, fuse):
        assert not r.errors and r.weight_bytes[0] == r.weight_bytes[1]
    assert len(weights.errors) == 14
    for path, error in weights.errors.items():
        dense = ir.get(model, path).get_value()
        assert error == pytest.approx(families.relative(tensor.quantize(dense, INT8).dequantize(), dense), rel=1e-4)
    mean, largest = pipeline.flat_errors(weights)
    assert 0 < mean < largest == max(weights.errors.values())


def test_the_report_prints_and_serialises(model):
    compiled = optx.compile(model, full_recipe())
    text = str(compiled.report)
    for line in (
        "CausalLM + full for cpu",
        "sliding_window skipped sites: layer not listed",
        "kernels:",
        "quant_matmul",
    ):
        assert line in text
    data = json.loads(json.dumps(compiled.report.to_dict()))
    assert [record["pass"] for record in data["records"]] == [record.name for record in compiled.plan.records]
    assert data["records"][1]["error"]["max"] == max(compiled.plan.records[1].errors.values())


def test_compiling_twice_from_one_plan_does_not_add_up(model):
    first, second = (optx.compile(model, full_recipe()) for _ in range(2))
    assert first.plan.records[1].errors == second.plan.records[1].errors


# Legality.


def narrow_cache(site, attn, opt):
    return ir.replace(attn, cache=attn.cache.replace(window=3))


@pytest.mark.parametrize("first", list(Axis))
@pytest.mark.parametrize("second", list(Axis))
def test_what_stacks_with_what(first, second, make):
    names = {"one": (first, Stage.ATTENTION), "two": (second, Stage.CACHE)}
    one, two = (make(narrow_cache, Attention, name=n, axis=axis, stage=stage) for n, (axis, stage) in names.items())
    recipe = Recipe(attention=[one()], cache=[two()])
    if {first, second} == {Axis.READS, Axis.DROP}:
        with pytest.raises(LegalityError, match=rf"one \({first}\) and two \({second}\) bet on the same redundancy"):
            legality.check_stack(recipe)
        legality.check_stack(dataclasses.replace(recipe, allow_overlap=True))
    else:
        legality.check_stack(recipe)


def test_an_illegal_stack_is_refused_before_any_pass_runs(make):
    def never(site, attn, opt):
        raise AssertionError("ran")

    reads = make(never, Attention, name="reads_less", axis=Axis.READS, stage=Stage.ATTENTION)
    drops = make(never, Attention, name="drops_some", axis=Axis.DROP, stage=Stage.CACHE)
    with pytest.raises(LegalityError, match="set allow_overlap: true to stack them"):
        plan(families.abstract("llama"), attention=[reads()], cache=[drops()])


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("format, refused", [("int4", True), ("int8", False), ("fp8_e4m3", False)])
def test_low_bit_keys_under_a_bias_are_refused_unless_allowed(format, refused, fuse):
    tree = families.abstract("qwen3", attention_bias=True)
    recipe = Recipe(cache=[QuantizeKV(format=format)], lower=[FuseProjections()] if fuse else [])
    if refused:
        with pytest.raises(
            LegalityError,
            match=r"quantize_kv at layers/0/mixer and 1 more: a key bias .*override with allow: \[k_bias_low_bit_kv\]",
        ):
            optx.plan(tree, recipe)
        recipe = dataclasses.replace(recipe, allow=("k_bias_low_bit_kv",))
    assert optx.plan(tree, recipe).records
    assert optx.plan(families.abstract("qwen3"), dataclasses.replace(recipe, allow=())).records, "no bias, no refusal"


def test_an_unknown_name_in_allow(model):
    with pytest.raises(
        LegalityError, match=r"recipe.allow: 'k_bias_low_bits' is no refusal; did you mean 'k_bias_low_bit_kv'\?"
    ):
        plan(model, allow=("k_bias_low_bits",))


def test_a_required_backend(model):
    assert "xla" in optx.compile(model, Recipe(require="xla")).explain()
    with pytest.raises(OptxError, match="no backend 'zzz'.*mosaic_gpu.*xla"):
        optx.compile(model, Recipe(require="zzz"))
    with pytest.raises(OptxError, match="the recipe requires mosaic_gpu.*leave out 'require'"):
        optx.compile(model, Recipe(require="mosaic_gpu"))


def test_a_pass_may_replace_a_stream(make):
    """What the verifier holds to is the fixpoint, not the cache that was: a spec may change."""

    class KeysOnly(Attention):
        def __call__(self, x, ragged, view):
            y = self.o(self.q(x))
            return y, {} if view is None else self.cache.append(view.pool, {"k": self.k(x)[:, None]}, view.writes)

    def swap(site, attn, opt):
        spec = attn.cache.replace(streams=(Stream(name="k", shape=(1, 16)),))
        return ir.replace(as_class(KeysOnly)(site, attn, opt), cache=spec)

    record = plan(families.abstract("llama"), weights=[make(swap, Attention)()]).records[0]
    assert record.cache_bytes == (256, 128)


def test_skipped_sites_stay_as_they_are(make):
    def some(site, linear, opt):
        return (
            Skipped("odd layer")
            if site.layer % 2
            else ir.replace(linear, weight=tensor.quantize(linear.weight.get_value(), INT8))
        )

    planned = plan(families.abstract("gemma3"), weights=[make(some)(match="layers/./mixer/q")])
    assert planned.records[0].sites == 2
    assert planned.records[0].skipped == {"layers/1/mixer/q": "odd layer"}
    assert [formats(planned.tree)[f"layers/{i}/mixer/q/weight"] for i in range(3)] == ["int8", "f32", "int8"]
