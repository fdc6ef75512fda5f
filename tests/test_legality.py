"""What is known to break: every fact holds where it should and nowhere else, refuses by name, and says how to go on."""

import dataclasses
import re
from pathlib import Path

import families
import pytest

import optx
from optx import ir, legality, pipeline, registry, tensor
from optx.errors import LegalityError
from optx.formats import Int
from optx.nn import MLA, Attention, Mamba2, Rope
from optx.nn.moe import Experts, MoE, Router
from optx.passes.clsa import Clsa
from optx.passes.evict_kv import EvictKV
from optx.passes.kivi import Kivi
from optx.passes.moba import Moba
from optx.passes.quantize_activations import QuantizeActivations
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.reduce_experts import ReduceExperts
from optx.passes.rotate import Rotate
from optx.passes.rotate_online import RotateOnline
from optx.passes.share_kv import ShareKV
from optx.passes.sliding_window import SlidingWindow
from optx.passes.split_key_bias import SplitKeyBias
from optx.passes.turboquant import TurboQuant
from optx.recipe import Recipe
from optx.registry import Axis, PassOptions, Stage

D = families.D
INT8, KV8 = QuantizeWeights(format="int8"), QuantizeKV()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold(PassOptions):
    pass


@pytest.fixture
def fold():
    """A pass of the fold stage, registered for one test."""

    def fold_nothing(site, attn: Attention, opt):
        return ir.replace(attn)

    registry.register("fold_nothing", axis=Axis.LAYOUT, stage=Stage.FOLD, options=Fold, exact=True)(fold_nothing)
    yield
    del registry.PASSES["fold_nothing"]


def llama(**changes):
    return families.abstract("llama", **changes)


def with_mixers(make):
    """A llama whose token mixers are `make()`."""
    model = llama()
    for i in range(len(model.layers)):
        ir.put(model, f"layers/{i}/mixer", make())
    return model


def mamba():
    return with_mixers(lambda: Mamba2(D, heads=2, head_dim=8, state_dim=4))


def latents():
    return with_mixers(lambda: MLA(D, heads=2, rank=8, nope_dim=4, value_dim=4, rope=Rope(theta=10000.0, dim=4)))


def packed(width=4):
    model = llama()
    gate = model.layers[0].mlp.gate
    weight = tensor.quantize(gate.weight.get_value(), Int(width=width, group=8))
    ir.put(model, "layers/0/mlp/gate", ir.replace(gate, weight=weight))
    return model


def packed_query():
    model = llama()
    q = model.layers[1].mixer.q
    ir.put(model, "layers/1/mixer/q", ir.replace(q, weight=tensor.quantize(q.weight.get_value(), Int(width=8))))
    return model


def cached(width, **changes):
    """Layer 1 keeps its keys and values in `width` bits."""
    model = llama(**changes)
    mixer = model.layers[1].mixer
    ir.put(model, "layers/1/mixer", ir.replace(mixer, cache=mixer.cache.replace(format=Int(width=width))))
    return model


def shared():
    """Layer 1 reads the cache of layer 0."""
    model = llama()
    mixer = model.layers[1].mixer
    ir.put(model, "layers/1/mixer", ir.replace(mixer, k=None, v=None, cache=mixer.cache.replace(share=0)))
    return model


def chosen():
    """With reads selected."""
    return optx.plan(llama(), Recipe(attention=[Moba(block=8)]), "cpu").tree


def routed(width=None):
    model = llama()
    router = Router(D, 4, top_k=2)
    if width:
        router = ir.replace(router, weight=tensor.quantize(router.weight.get_value(), Int(width=width)))
    ir.put(model, "layers/0/mlp", MoE(router, Experts(4, D, 32)))
    return model


def tied(width):
    model = families.abstract("qwen3")
    table = tensor.quantize(model.embed.table.get_value(), Int(width=width), axis=-1)
    ir.put(model, "embed", ir.replace(model.embed, table=table))
    return model


def window(**options):
    return Recipe(attention=[SlidingWindow(**({"window": 8} | options))])


def weights(**options):
    return Recipe(weights=[QuantizeWeights(**options)])


def kv(format="int8"):
    return Recipe(cache=[QuantizeKV(format=format)])


NO_SINKS = {"policy": "streaming_llm", "budget": 8, "sinks": 0}


def evicted(**options):
    return Recipe(cache=[EvictKV(**({"policy": "h2o", "budget": 8} | options))])


def repeated(**options):
    return Recipe(cache=[EvictKV(policy="kvzip", ratio=0.5, **options)])


def exact():
    return optx.plan(llama(), Recipe(cache=[QuantizeKV(format="int8", recent=4)]), "cpu").tree


def split():
    return optx.plan(llama(attention_bias=True), Recipe(fold=[SplitKeyBias()]), "cpu").tree


def sink_logits():
    return with_mixers(with_sink_logits)


# (fact, model, recipe, path at which it holds, or None where it does not)
def rotated(**options):
    return Recipe(fold=[Rotate(**options)])


def rounded_inputs():
    return Recipe(weights=[QuantizeActivations(format="int8", match="layers/0/.*")])


# Facts of which the tests of their passes have a case that holds; here they have one where they do not.
APART = {
    "values_read_elsewhere": "test_smoothquant.py",
    "rotated_in_part": "test_rotate.py",
    "keys_rotated_apart": "test_rotate_online.py",
    "keys_rotated_twice": "test_turboquant.py",
    "codebook_of_gated_values": "test_turboquant.py",
    "split_keys_read_by_others": "test_split_key_bias.py",
    "reads_other_heads": "test_share_kv.py",
    "select_without_key_bias": "test_moba.py",
    "rotated_under_index": "test_nsa.py",
    "index_of_scaled_heads": "test_dsa.py",
    "no_layer_to_choose": "test_clsa.py",
}
CASES = [
    ("stream_does_not_rotate", lambda: families.abstract("gemma3"), rotated(), "layers/0"),
    ("stream_does_not_rotate", llama, rotated(), None),
    ("rotated_in_part", llama, rotated(), None),
    ("keys_rotated_apart", llama, Recipe(fold=[RotateOnline()]), None),
    ("keys_rotated_twice", llama, Recipe(fold=[RotateOnline()]), None),
    ("codebook_of_gated_values", llama, Recipe(fold=[TurboQuant()]), None),
    ("split_keys_read_by_others", lambda: llama(attention_bias=True), Recipe(fold=[SplitKeyBias()]), None),
    ("reads_other_heads", llama, Recipe(structure=[ShareKV(factor=2)]), None),
    ("values_read_elsewhere", llama, kv(), None),
    ("activations_without_weights", llama, rounded_inputs(), "layers/0/mixer/q"),
    ("activations_without_weights", packed, rounded_inputs(), None),
    ("packed_twice", packed, weights(format="int8"), "layers/0/mlp/gate/weight"),
    ("packed_twice", packed, weights(format="int8", requantize=True), None),
    ("packed_twice", packed, weights(format="int8", match=".*/down"), None),
    ("packed_before_fold", packed_query, "fold", "layers/1/mixer/q/weight"),
    ("packed_before_fold", packed, "fold", None),  # of no site of the pass
    ("packed_before_fold", packed_query, kv(), None),  # computes no weights
    ("weights_do_not_divide", llama, weights(format="int4", group=24), "layers/0/mixer/q"),
    ("weights_do_not_divide", llama, weights(format="int4", group=16), None),
    ("weights_do_not_divide", llama, weights(format="int4", group=64, match=".*/down"), None),
    ("heads_do_not_divide", lambda: llama(head_dim=12), kv("int4"), None),
    ("heads_do_not_divide", lambda: llama(head_dim=12), Recipe(cache=[QuantizeKV(format="int3")]), "layers/0/mixer"),
    ("cache_packed_twice", lambda: cached(8), kv(), "layers/1/mixer"),
    ("cache_packed_twice", llama, kv(), None),
    ("no_token_cache", mamba, kv(), "layers/0/mixer"),
    ("no_token_cache", mamba, window(), "layers/0/mixer"),
    ("no_token_cache", families.hybrid, window(), None),
    ("latents_alone", latents, Recipe(cache=[Kivi(group=4)]), "layers/0/mixer"),
    ("latents_alone", latents, window(), "layers/0/mixer"),
    ("latents_alone", families.hybrid, window(), None),  # beside keys and values by head
    ("latents_alone", latents, weights(format="int8"), None),
    ("windowed_already", lambda: window_of(6), window(window=6), "layers/0/mixer"),
    ("windowed_already", lambda: window_of(6), window(window=5), None),
    ("windowed_already", lambda: families.abstract("gemma3"), window(), None),  # one layer is global
    ("window_without_sinks", llama, window(sinks=0), "layers/0/mixer"),
    ("window_without_sinks", llama, window(sinks=1), None),
    ("window_without_sinks", llama, window(sinks=0, layers=(0,)), None),
    ("window_without_sinks", llama, window(sinks=0, keep_every=2), None),
    ("window_without_sinks", lambda: window_of(9), window(sinks=0), None),  # trained with a window
    ("window_without_sinks", lambda: with_mixers(with_sink_logits), window(sinks=0), None),
    ("window_over_shared_cache", shared, window(layers=(0,)), "layers/1/mixer"),
    ("window_over_shared_cache", shared, window(), None),
    ("no_token_cache", mamba, evicted(), "layers/0/mixer"),
    ("latents_alone", latents, evicted(), "layers/0/mixer"),
    ("evict_under_windows", lambda: window_of(6), evicted(), "layers/0/mixer"),
    ("evict_under_windows", lambda: families.abstract("gemma3"), evicted(), None),  # one layer is global
    ("evict_over_shared_cache", shared, evicted(match="layers/0/.*"), "layers/1/mixer"),
    ("evict_over_shared_cache", shared, evicted(), None),
    ("evict_beside_exact_tokens", exact, evicted(), "layers/0/mixer"),
    ("evict_beside_exact_tokens", lambda: cached(8), evicted(), None),  # a scale a token
    ("evict_under_split_keys", split, evicted(), "layers/0/mixer"),
    ("evict_under_split_keys", lambda: llama(attention_bias=True), evicted(), None),
    ("stream_without_sinks", llama, evicted(**NO_SINKS), "layers/0/mixer"),
    ("stream_without_sinks", llama, evicted(**NO_SINKS | {"sinks": 1}), None),
    ("stream_without_sinks", llama, evicted(), None),  # heavy hitters are kept by attention
    ("stream_without_sinks", sink_logits, evicted(**NO_SINKS), None),
    ("repetition_cannot_step_back", families.hybrid, repeated(match="layers/0/.*|layers/4/.*"), "layers/1/mixer"),
    (
        "repetition_cannot_step_back",
        lambda: families.abstract("gemma3"),
        repeated(),
        None,
    ),  # windows keep what they had
    ("repetition_cannot_step_back", llama, repeated(match="layers/1/.*"), "layers/0/mixer"),
    ("repetition_cannot_step_back", llama, repeated(), None),
    ("repetition_cannot_step_back", lambda: families.abstract("gemma3"), evicted(), None),  # feeds nothing again
    ("selected_twice", chosen, Recipe(attention=[Moba(block=8)]), "layers/0/mixer"),
    ("selected_twice", llama, Recipe(attention=[Moba(block=8)]), None),
    ("exact_tokens_beside_selection", chosen, Recipe(cache=[QuantizeKV(format="int8", recent=4)]), "layers/0/mixer"),
    ("exact_tokens_beside_selection", chosen, Recipe(cache=[KV8]), None),
    ("fewer_experts_than_a_token_takes", routed, Recipe(structure=[ReduceExperts(keep=1)]), "layers/0/mlp"),
    ("fewer_experts_than_a_token_takes", routed, Recipe(structure=[ReduceExperts(keep=2)]), None),
    ("select_without_key_bias", lambda: llama(attention_bias=True), Recipe(fold=[SplitKeyBias()]), None),
    ("rotated_under_index", llama, rotated(), None),
    ("index_of_scaled_heads", llama, Recipe(cache=[KV8]), None),
    ("no_layer_to_choose", llama, Recipe(attention=[Moba(block=8), Clsa()]), None),
    ("k_bias_low_bit_kv", lambda: llama(attention_bias=True), kv("int4"), "layers/0/mixer"),
    ("k_bias_low_bit_kv", lambda: llama(attention_bias=True), kv("fp8_e4m3"), None),
    ("k_bias_low_bit_kv", llama, kv("int4"), None),
    ("gqa_kivi2", lambda: cached(2), Recipe(), "layers/1/mixer"),
    ("gqa_kivi2", lambda: cached(4), Recipe(), None),
    ("gqa_kivi2", lambda: cached(2, num_key_value_heads=4), Recipe(), None),  # every query head has its own
    ("low_bit_router", lambda: routed(4), Recipe(), "layers/0/mlp/router"),
    ("low_bit_router", lambda: routed(8), Recipe(), None),
    ("low_bit_router", routed, Recipe(weights=[INT8]), None),  # the pass leaves routers alone
    ("low_bit_tied_head", lambda: tied(2), Recipe(), "embed"),
    ("low_bit_tied_head", lambda: tied(4), Recipe(), None),
]


def window_of(size):
    model = llama()
    for i, layer in enumerate(model.layers):
        ir.put(model, f"layers/{i}/mixer", ir.replace(layer.mixer, cache=layer.mixer.cache.replace(window=size)))
    return model


def with_sink_logits():
    return Attention(D, heads=4, kv_heads=2, head_dim=8, rope=Rope(theta=10000.0, dim=8), sinks=True)


def judged(model, recipe):
    """Judgements by name, of as many passes as can run."""
    guard = legality.Guard(recipe)
    try:
        trees = pipeline.run(model, recipe, [guard], checks=())[0]
    except LegalityError:
        trees = guard.trees
    return {each.name: each for each in legality.judge(recipe, trees)}


@pytest.mark.parametrize("name, make, recipe, path", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_a_fact_holds_where_it_should(name, make, recipe, path, fold):
    recipe = Recipe(fold=[Fold()]) if recipe == "fold" else recipe
    model = make()
    found = judged(model, recipe)[name]
    assert (found.where[0] if found.where else None) == path and found.refused == (path is not None)
    if path is None:
        assert not found.passes and not found.got
        return
    assert found.passes == tuple(pass_.name for pass_, _ in recipe.steps()) and all(found.got)
    with pytest.raises(LegalityError) as error:
        optx.plan(model, recipe, "cpu")
    told, fact = str(error.value), next(fact for fact in legality.FACTS if fact.name == name)
    assert error.value.name == name and path in told
    for text in (fact.why, fact.fix, fact.source, *found.passes):
        assert text in told
    assert (f"or override with allow: [{name}]" in told) == fact.override


def test_every_fact_has_a_case_that_holds_and_one_that_does_not():
    names = {fact.name for fact in legality.FACTS}
    assert len(names) == len(legality.FACTS)
    for name, file in APART.items():
        assert name in (Path(__file__).parent / "passes" / file).read_text()
    assert {case[0] for case in CASES if case[3]} | set(APART) == {case[0] for case in CASES if not case[3]} == names


@pytest.mark.parametrize("fact", [*legality.FACTS, legality.STACK], ids=lambda fact: fact.name)
def test_a_source_can_be_looked_up(fact):
    assert re.match(r"arithmetic: |.*(arXiv:\d{4}\.\d{5}|llama\.cpp)", fact.source), fact.source
    assert fact.why and fact.fix


OVERRIDDEN = [case for case in CASES if case[3] and next(f for f in legality.FACTS if f.name == case[0]).override]


@pytest.mark.parametrize("name, make, recipe, path", OVERRIDDEN, ids=[case[0] for case in OVERRIDDEN])
def test_what_can_be_overridden_then_runs(name, make, recipe, path, fold):
    recipe = Recipe(fold=[Fold()]) if recipe == "fold" else recipe
    planned = optx.plan(make(), dataclasses.replace(recipe, allow=(name,)), "cpu")
    found = {each.name: each for each in legality.judge(planned.recipe, planned.trees)}[name]
    assert found.where[0] == path and found.allowed and not found.refused


def test_what_could_not_run_cannot_be_overridden():
    with pytest.raises(
        LegalityError, match="recipe.allow: packed_twice cannot be overridden, the pass could not run; load"
    ):
        optx.plan(packed(), dataclasses.replace(weights(format="int8"), allow=("packed_twice",)), "cpu")


def test_a_fact_of_the_loaded_model_names_no_pass():
    recipe = Recipe(weights=[INT8])
    planned = trees_of(cached(2), recipe)
    found = {each.name: each for each in legality.judge(recipe, planned)}["gqa_kivi2"]
    assert found.where == ("layers/1/mixer",) and found.passes == ()
    with pytest.raises(LegalityError, match="^layers/1/mixer: several query heads"):
        legality.check_facts(recipe, *planned)


def trees_of(model, recipe):
    return pipeline.run(model, recipe, checks=())[0]


def test_a_fact_names_the_pass_that_made_it_so():
    recipe = Recipe(weights=[INT8], cache=[QuantizeKV(format="int4")], allow=["k_bias_low_bit_kv"])
    trees = trees_of(llama(attention_bias=True), recipe)
    found = {each.name: each for each in legality.judge(recipe, trees)}["k_bias_low_bit_kv"]
    assert found.passes == ("quantize_kv",) and found.got == ("paged int4",) and len(found.where) == 2


def test_the_first_matching_rule_is_what_is_judged():
    rules = [QuantizeWeights(format="int8", match=".*/gate"), QuantizeWeights(format="int4", group=24, match=".*")]
    found = judged(llama(), Recipe(weights=rules))["weights_do_not_divide"]
    assert "layers/0/mlp/up" in found.where and "layers/0/mlp/gate" not in found.where


def test_a_wrong_option_is_the_passs_own_error():
    with pytest.raises(optx.errors.PassError, match="fp8_e4m3 has no zero point"):
        optx.plan(llama(), weights(format="fp8_e4m3", symmetric=False), "cpu")
