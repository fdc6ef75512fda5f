"""evict_kv: layers whose rows keep a budget of tokens, with what the plan, the kernels and the verifier say of it."""

import families
import pytest
import tiny

import optx
from optx import ir, lower
from optx import target as targets
from optx.engine.compaction import table_for
from optx.engine.pages import PageTable
from optx.errors import FormatError, LegalityError, LoweringError, PassError, QualityError
from optx.eviction import POLICIES
from optx.formats import Int
from optx.passes.evict_kv import EvictKV
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.sliding_window import SlidingWindow
from optx.recipe import Recipe

BEFORE = """\
CausalLM context=128
  layers/0-1: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.25 rope=(rope 10000/8) cache=(paged float32 window 6)
  layers/2: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.25 rope=(rope 1e+06/8) cache=(paged float32)
"""

EXPECTED = """\
CausalLM context=128
  layers/0-1: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.25 rope=(rope 10000/8) cache=(paged float32 window 6)
  layers/2: Block
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.25 rope=(rope 1e+06/8) cache=(paged float32 evict snapkv 0.25 of the prompt)
"""  # noqa: E501

RULES = {
    name: EvictKV(policy=name, **({"ratio": 0.25} if kind.once else {"budget": 16, "slack": 8}))
    for name, kind in POLICIES.items()
}


def mixers(tree) -> str:
    """The lines of the printed tree that name the model, its blocks and their mixers."""
    wanted = ("CausalLM", "layers/", "mixer:")
    return "".join(f"{line}\n" for line in ir.describe(tree).splitlines() if line.strip().startswith(wanted))


def test_before_expected():
    """Layers with a window stay as they are."""
    planned = optx.plan(families.abstract("gemma3"), Recipe(cache=[RULES["snapkv"]]))
    assert mixers(planned.trees[0]) == BEFORE
    assert mixers(planned.tree) == EXPECTED
    assert "has a window of 6" in str(planned.records[0].skipped)


@pytest.mark.parametrize("name", POLICIES)
def test_the_pass_plans_and_verifies_with_what_comes_behind_it(name):
    """Caches stay a fixpoint of the step, with packed pages and joined projections too."""
    recipe = Recipe(cache=[RULES[name], QuantizeKV(format="int8")], lower=[FuseProjections()])
    cache = optx.plan(families.abstract("qwen3"), recipe).tree.layers[0].mixer.cache
    assert cache.evict == RULES[name].build() and cache.format == Int(width=8)
    assert cache.rotated == (name != "streaming_llm")


def test_a_forward_without_caches_is_unchanged():
    """Nothing is thrown away there; keys that are stored before RoPE are rotated all the same."""
    model, tokens = families.concrete("qwen3"), families.prompt(20)
    compiled = optx.compile(model, Recipe(cache=[RULES["streaming_llm"]]))
    assert families.relative(compiled.logits([tokens])[0], families.forward(model, tokens)) < 1e-6


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "tova"])
def test_chunks_over_pages_are_the_forward_while_the_budget_holds(name):
    """Queries and keys by slot, recorded attention beside them, chunks of uneven sizes: the same logits."""
    model, tokens = families.concrete("qwen3"), families.prompt(20)
    rule = EvictKV(policy=name, budget=32, slack=8)
    tree = optx.compile(model, Recipe(cache=[rule])).tree
    if name == "tova":  # counts the newest query: it asks no prompt, but goes through the same rule
        assert not tree.layers[0].mixer.cache.evict.plain
        return
    assert families.relative(families.incremental(tree, tokens, (7, 1, 4)), families.forward(model, tokens)) < 1e-5


def test_an_export_remembers_its_policy(tmp_path):
    folder, _ = families.hf_dir(tmp_path / "model", "llama")
    compiled = optx.compile(optx.load(folder), Recipe(cache=[RULES["snapkv"]]))
    optx.export(compiled, tmp_path / "out")
    assert optx.compile(optx.load(tmp_path / "out")).program.plan == compiled.program.plan


# What it costs.


def test_the_plan_counts_the_budget_and_what_is_recorded():
    """Keys and values of 2 layers, 2 heads, 16 numbers: 512 B a token in float32; snapkv adds a number a head."""
    model = families.abstract("qwen3")
    plain = optx.plan(model).bytes_per_token(1, 128)["kv"]
    assert plain == 128 * 512
    planned = optx.plan(model, Recipe(cache=[RULES["streaming_llm"]]))
    assert planned.bytes_per_token(1, 128)["kv"] == 24 * 512 and planned.bytes_per_token(1, 10)["kv"] == 10 * 512
    snap = optx.plan(model, Recipe(cache=[EvictKV(policy="snapkv", ratio=0.25, recent=4)]))
    assert snap.bytes_per_token(1, 128)["kv"] == 32 * (512 + 2 * 2 * 4)
    assert snap.estimate(1, 128).to_dict() != optx.plan(model).estimate(1, 128).to_dict()


def test_layers_of_one_policy_share_a_table():
    model = families.abstract("llama", num_hidden_layers=4)
    rules = [EvictKV(policy="h2o", budget=64, match="layers/[01]/.*"), EvictKV(policy="h2o", budget=32)]
    plan = optx.plan(model, Recipe(cache=rules)).tree.cache_plan()
    assert [plan.group(i) for i in range(4)] == [0, 0, 1, 1]
    tables = [
        table_for(spec, 9, rows=1, width=PageTable.width_for(spec, 10**6, 512, 32), page_size=32)
        for spec in plan.groups
    ]
    assert [table.width for table in tables] == [4, 3], "budget and slack of 64 tokens"


# Kernels.


def declined(policy):
    recipe = Recipe(cache=[RULES[policy]])
    tree = optx.plan(families.abstract("qwen3", dtype="bfloat16", head_dim=64), recipe, "h100").tree
    chosen = lower.choose(tree, targets.get("h100"))
    return {c.op: (c.backend, dict(c.declined)) for _, c in lower.choices(chosen)}


@pytest.mark.parametrize("policy", ["snapkv", "kvzip"])
def test_decodes_of_a_compacted_prompt_take_the_kernel(policy):
    """Only chunks of prompts are asked what they attend to."""
    found = declined(policy)
    assert found["paged_decode"][0] == "mosaic_gpu"
    assert found["ragged_paged_attention"][0] == "xla"
    assert "returns no attention by slot" in found["ragged_paged_attention"][1]["mosaic_gpu/sm90"]


def test_a_kernel_that_sums_attention_serves_the_policy_that_needs_the_sum():
    assert declined("h2o")["paged_decode"][0] == "mosaic_gpu"
    backend, reasons = declined("tova")["paged_decode"]
    assert backend == "xla" and "counts some or takes the largest" in reasons["mosaic_gpu/sm90"]


def test_keys_by_slot_are_read_by_the_reference():
    backend, reasons = declined("streaming_llm")["paged_decode"]
    assert backend == "xla" and "rotated by their slot" in reasons["mosaic_gpu/sm90"]


def test_a_kernel_that_records_prompts_runs_where_it_is_required():
    model = families.abstract("qwen3", dtype="bfloat16", head_dim=64)
    tree = optx.plan(model, Recipe(cache=[RULES["snapkv"]]), "h100").tree
    for require, row in ((None, "xla"), ("mosaic_gpu", "mosaic_gpu/sm90/scored")):
        chosen = lower.choose(tree, targets.get("h100"), require=require)
        assert {str(c) for _, c in lower.choices(chosen) if c.op == "ragged_paged_attention"} == {row}


def test_a_required_kernel_without_scores_is_refused_with_the_reason():
    model = families.abstract("qwen3", dtype="bfloat16", head_dim=64)
    tree = optx.plan(model, Recipe(cache=[EvictKV(policy="kvzip", ratio=0.25, over="model")]), "h100").tree
    with pytest.raises(LoweringError, match="returns no attention by slot, which the policy of eviction records"):
        lower.choose(tree, targets.get("h100"), require="mosaic_gpu")


# Errors.


@pytest.mark.parametrize(
    "rule, message",
    [
        (EvictKV(policy="snapvk", ratio=0.5), "no policy 'snapvk'; did you mean 'snapkv'"),
        (
            EvictKV(policy="h2o", budget=16, ratio=0.5),
            "policy h2o: ratio says nothing to it; it takes budget, sinks, recent",
        ),
        (EvictKV(policy="tova"), "policy tova: budget is missing"),
        (EvictKV(policy="snapkv", budget=64), r"layers/\d/mixer: snapkv: a budget of 64 tokens; allowed: above 64"),
        (EvictKV(policy="streaming_llm", budget=4), "a budget of 4 tokens; allowed: above 5, the 4 sinks and 1 recent"),
    ],
)
def test_wrong_options_are_refused(rule, message):
    with pytest.raises(PassError, match=message):
        optx.plan(families.abstract("llama"), Recipe(cache=[rule]))


def test_a_cache_is_not_evicted_twice():
    planned = optx.plan(families.abstract("llama"), Recipe(cache=[RULES["h2o"]]))
    with pytest.raises(PassError, match=r"throws tokens away already \(h2o 16\)"):
        optx.plan(planned.tree, Recipe(cache=[RULES["tova"]]))


def test_reads_and_drop_bet_on_the_same():
    recipe = Recipe(attention=[SlidingWindow(window=8, layers=(0,))], cache=[RULES["h2o"]])
    with pytest.raises(LegalityError, match="bet on the same redundancy"):
        optx.plan(families.abstract("llama"), recipe)


def test_windows_and_other_kinds_of_cache_hold_no_policy():
    spec = families.abstract("llama").layers[0].mixer.cache
    with pytest.raises(FormatError, match="a window of 8 tokens with eviction"):
        spec.replace(window=8, evict=RULES["h2o"].build())
    with pytest.raises(FormatError, match="a latent cache with eviction"):
        spec.replace(kind="latent", evict=RULES["h2o"].build())


@pytest.mark.parametrize("name", ["stream", "snapkv_25", "kvzip_30"])
def test_recipes_that_ship_plan(name):
    planned = optx.plan(families.abstract("llama"), Recipe.from_yaml(f"configs/{name}.yaml"))
    assert planned.tree.cache_plan().groups[0].evict is not None


def test_one_forward_does_not_pass_for_what_the_cache_keeps(tmp_path):
    source = optx.load(tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=1))
    rule = EvictKV(policy="streaming_llm", budget=16, sinks=2, slack=4)
    compiled = optx.compile(source, Recipe(cache=(rule,)))
    with pytest.raises(QualityError, match="throws tokens away.*--paged"):
        compiled.evaluate(tiny.TEXT, context=64, max_windows=1)
    assert compiled.evaluate(tiny.TEXT, context=20, max_windows=1).tokens == 19, "all that fits is kept"
    with pytest.raises(QualityError, match="max_kl: evict_kv throws cached tokens away"):
        optx.compile(source, Recipe(cache=(rule,), max_kl=1.0), calibration=tiny.TEXT)
    measured = optx.compile(source, Recipe(cache=(rule,)), calibration=tiny.TEXT)
    assert [record.quality for record in measured.plan.records] == [None]
