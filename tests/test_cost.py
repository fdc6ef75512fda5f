"""Bytes and operations of a step, read off the trees of published configs, against figures worked out by hand."""

import functools

import pytest

import optx
from optx import cost, ir
from optx.cache import CachePlan, CacheSpec, Stream
from optx.configs import model_path
from optx.cost import Selection, step_bytes, step_ops
from optx.formats import Int
from optx.nn import Attention, Block, CausalLM, Embed, Linear, RMSNorm
from optx.pallas import dispatch
from optx.passes.quantize_weights import QuantizeWeights
from optx.recipe import Recipe
from optx.target import TARGETS


@functools.cache
def tree(name):
    return optx.load_config(model_path(name)).tree


def total(ops, field, kind=None):
    return sum(getattr(op, field) for op in ops if kind is None or op.op == kind)


# --- Qwen3-8B, the running example -------------------------------------------------------------------------------------

CONTEXT = 40_960


def test_a_decode_step_of_the_running_example():
    step = step_bytes(tree("qwen3-8b"), 1, CONTEXT)
    assert step.kv_token == 147_456
    assert ir.weight_bytes(tree("qwen3-8b")) == 16_381_470_720  # 16.4 GB
    assert step.weights == 15_136_811_008  # 15.1 GB
    assert step.kv == 147_456 * CONTEXT == 6_039_797_760
    assert step.total == 21_176_608_768  # 21.2 GB
    assert 1e3 * step.seconds(TARGETS["h100"]) == pytest.approx(6.321, abs=1e-3)


def test_the_embedding_that_a_step_does_not_read():
    """With it the step is the 22 GB and 6.6 ms that are often quoted."""
    step = step_bytes(tree("qwen3-8b"), 1, CONTEXT)
    assert step.unread == 151_936 * 4096 * 2
    counted = step.total + step.unread
    assert counted == 22_421_268_480
    assert 1e3 * counted / 3.35e12 == pytest.approx(6.693, abs=1e-3)
    rounded = 22e9 / TARGETS["h100"].bandwidth
    assert 1e3 * rounded == pytest.approx(6.567, abs=1e-3)


def test_ops_add_up_to_the_step():
    ops = step_ops(tree("qwen3-8b"), batch=3, context=CONTEXT)
    step = step_bytes(tree("qwen3-8b"), 3, CONTEXT)
    assert (total(ops, "weights"), total(ops, "cache")) == (step.weights, step.kv)
    assert total(ops, "written") == 3 * step.kv_token
    assert {op.op for op in ops} == {"matmul", "head", "vectors", "attention"}
    assert {op.layer for op in ops} == {None, *range(36)}


def test_a_prefill_of_the_running_example():
    ops = step_ops(tree("qwen3-8b"), tokens=CONTEXT, context=CONTEXT)
    linear, attention = total(ops, "flops", "matmul"), total(ops, "flops", "attention")
    weights = 36 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12_288)
    assert linear == 2 * CONTEXT * weights
    assert attention == 36 * 4 * 32 * 128 * CONTEXT * (CONTEXT + 1) // 2
    assert (linear / 1e12, attention / 1e12) == (pytest.approx(569.0, abs=0.1), pytest.approx(494.8, abs=0.1))
    assert total(ops, "flops") / 1e12 == pytest.approx(1063.8, abs=0.1)
    assert total(ops, "flops") / 989e12 == pytest.approx(1.076, abs=1e-3)  # 1.08 s
    assert total(ops, "flops", "head") == 2 * 4096 * 151_936, "the head runs for the last token alone"
    once = linear / 2 + attention
    assert once / 1e12 == pytest.approx(779, abs=1), "the quoted 750: multiply-adds of the linear part counted once"


def test_streams_of_the_running_example():
    """32 x 40,960 tokens: 193.3 GB; 192 is 32 x the rounded 6 GB."""
    plan = tree("qwen3-8b").cache_plan()
    assert plan.bytes(32, CONTEXT) == 193_273_528_320
    assert 32 * round(plan.bytes(1, CONTEXT) / 1e9) == 192


# --- latents, experts, selections --------------------------------------------------------------------------------------


def test_a_latent_against_all_heads():
    model = tree("deepseek-v3")
    assert step_bytes(model).kv_token == 70_272  # 70 kB
    mixer = model.layers[0].mixer
    assert sum(stream.shape[-1] for stream in mixer.cache.streams) == 576
    assert mixer.kv_b.weight.get_value().shape[-1] == 128 * (128 + 128) == 32_768


def test_a_latent_is_expanded_in_a_prefill_and_absorbed_in_a_decode_step():
    model = tree("deepseek-v3")
    expanded = total(step_ops(model, tokens=100, context=100), "flops", "attention")
    absorbed = total(step_ops(model, context=100), "flops", "attention")
    assert expanded == 61 * 2 * 128 * (192 + 128) * 5050
    assert absorbed == 61 * 2 * 128 * (576 + 512) * 100


def test_an_index_reads_its_keys_and_the_chosen_latents():
    """128 B of index keys in bf16 are 256; chosen: 2,048 latents of 1,152 B."""
    model = tree("deepseek-v3.2")
    for context in (100, 2048):
        assert step_bytes(model, 1, context).kv == 61 * 1152 * context
    assert step_bytes(model, 2, 131_072).kv == 2 * 61 * (256 * 131_072 + 1152 * 2048)
    ops = step_ops(model, context=131_072)
    each = 2 * 64 * 128 * 131_072 + 2 * 128 * (576 + 512) * 2048
    assert total(ops, "flops", "attention") == 61 * each
    assert step_bytes(model, 1, 131_072).held > ir.weight_bytes(model) + 61 * 1408 * 131_071, "memory holds all"


def test_read_ratios_of_block_sparse_attention():
    nsa = Selection(stride=16, blocks=16, block=64, window=512)
    ratios = [nsa.ratio(1024 * k) for k in (8, 16, 32, 64)]
    assert ratios == [pytest.approx(x, abs=0.05) for x in (4.0, 6.4, 9.1, 11.6)]
    assert nsa.ratio(1024) == 1, "never more than all"


@functools.cache
def four_bit():
    recipe = Recipe(weights=[QuantizeWeights(match=".*", format="nvfp4")])
    return optx.plan(optx.load_config(model_path("qwen3-30b-a3b")), recipe, "b200").tree


def test_experts_in_four_bits():
    """All at 4.5 bits: 17.2 GB (16.0 GiB), of which a token meets 1.89 GB (1.76 GiB) with the embedding's share."""
    model = tree("qwen3-30b-a3b")
    assert ir.weight_count(model) * 4.5 / 8 == pytest.approx(17.174e9, abs=1e6)
    assert ir.weight_count(model) * 4.5 / 8 / 2**30 == pytest.approx(16.0, abs=0.01)
    assert ir.active_count(model) * 4.5 / 8 == pytest.approx(1.886e9, abs=1e6)
    table = ir.weight_count(model.embed)
    assert (ir.active_count(model) - table) * 4.5 / 8 == pytest.approx(1.711e9, abs=1e6)


def test_experts_in_four_bits_as_the_pass_stores_them():
    """Embedding and routers stay in bf16, and each output channel has a float32 scale."""
    stored, read = ir.weight_bytes(four_bit()), cost.weights_read(four_bit(), 1)
    assert (stored, read) == (17_730_074_112, 1_736_930_816)
    ops = step_ops(four_bit())
    assert total(ops, "weights") == pytest.approx(read, abs=1)
    assert {op.format for op in ops if op.op == "experts"} == {"nvfp4"}


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_experts_of_a_batch(batch):
    """Bytes of the experts that are met, operations of those that each token takes."""
    model = tree("qwen3-30b-a3b")
    ops = step_ops(model, batch=batch)
    stored = sum(ir.weight_bytes(layer.mlp.experts) for layer in model.layers)
    assert total(ops, "weights", "experts") == pytest.approx(stored * (1 - (1 - 8 / 128) ** batch))
    assert total(ops, "flops", "experts") == pytest.approx(2 * batch * 48 * 8 * 3 * 2048 * 768)
    assert total(ops, "weights") == pytest.approx(cost.weights_read(model, batch), rel=1e-9)


KINDS = ("gpt-oss-20b", "qwen3-next-80b-a3b", "jamba-1.5-mini", "minimax-text-01", "gemma-3-1b", "bamba-9b")


@pytest.mark.parametrize("name", KINDS)
def test_ops_add_up_for_every_kind_of_layer(name):
    ops = step_ops(tree(name), batch=4, context=5000)
    assert total(ops, "weights") == pytest.approx(cost.weights_read(tree(name), 4), rel=1e-9)
    assert total(ops, "cache") == pytest.approx(tree(name).cache_plan().bytes(4, 5000))


def test_every_op_of_the_table_is_counted():
    """By the weights it multiplies, as attention, or as a recurrence; a new op needs a place in cost.py, or a line here."""
    by_weights = {"matmul", "quant_matmul", "grouped_matmul", "norm_matmul", "gated_matmul", "chained_matmul"}
    attention = {
        "flash_attention",
        "ragged_paged_attention",
        "paged_decode",
        "indexed_attention",
        "compressed_attention",
    }
    moves = {"rotate_append", "add_norm", "gated_act"}  # what others multiply
    chooses = {"top_blocks"}  # a number a block of tokens
    assert {row.op for row in dispatch.ROWS} <= by_weights | attention | cost.RECURRENCES.keys() | moves | chooses


# --- states, windows, shared caches ------------------------------------------------------------------------------------


def test_a_recurrence_reads_and_writes_its_state_whatever_the_context():
    model = tree("mamba2-2.7b")
    short, long = (step_ops(model, batch=2, context=context) for context in (1, 10**6))
    assert short == long
    assert total(short, "cache") == total(short, "written") == 2 * 169_836_544
    assert total(short, "flops", "state") == 2 * 64 * 5 * 80 * 64 * 128
    assert total(step_ops(model, tokens=9, context=9), "flops", "state") == 9 * 64 * 5 * 80 * 64 * 128


@pytest.mark.parametrize(
    "tokens, context, seen, want",
    [(1, 10, None, 10), (10, 10, None, 55), (1, 10, 4, 4), (10, 10, 4, 34), (3, 10, 4, 12), (3, 5, 4, 11)],
)
def test_pairs_under_a_mask(tokens, context, seen, want):
    brute = sum(min(i, seen or i) for i in range(context - tokens + 1, context + 1))
    assert cost.pairs(tokens, context, seen) == brute == want


def test_a_window_bounds_reads_and_operations():
    model = tree("mistral-7b")  # a window of 4,096
    ops = step_ops(model, context=32_768)
    assert total(ops, "cache") == 131_072 * 4096
    assert total(ops, "flops", "attention") == 32 * 4 * 32 * 128 * 4096
    chunk = step_ops(model, tokens=100, context=32_768)
    assert total(chunk, "cache") == 131_072 * (4096 + 99)


def shared():
    """Two layers, of which the second reads the cache of the first."""
    make = {"heads": 2, "kv_heads": 1, "head_dim": 8, "rope": None}
    blocks = [
        Block(norm=RMSNorm(16), mixer=Attention(16, **make, share=share), mlp_norm=None, mlp=None)
        for share in (None, 0)
    ]
    return CausalLM(embed=Embed(32, 16), layers=blocks, norm=RMSNorm(16), head=None, context=64)


def test_a_shared_cache_is_held_once_and_read_by_each():
    step = step_bytes(shared(), 1, 10)
    assert step.kv_token == 2 * 8 * 4
    assert step.held == ir.weight_bytes(shared()) + 10 * step.kv_token
    assert step.kv == 2 * 10 * step.kv_token


def test_a_tied_head_is_read_and_an_untied_embedding_is_not():
    tied = shared()
    assert step_bytes(tied).unread == 0
    assert total(step_ops(tied), "weights", "head") == 32 * 16 * 4
    untied = ir.replace(tied, output=Linear(16, 32))
    assert step_bytes(untied).unread == 32 * 16 * 4
    assert total(step_ops(untied), "weights") == total(step_ops(tied), "weights")


# --- a million tokens --------------------------------------------------------------------------------------------------


def million(streams, format=None):
    spec = CacheSpec(kind="latent", streams=streams, dtype="bfloat16", format=format)
    return CachePlan(specs=(spec,) * 36).bytes(1, 10**6) / 1e9


def test_a_million_tokens_of_the_running_example():
    assert tree("qwen3-8b").cache_plan().bytes(1, 10**6) / 1e9 == pytest.approx(147.456)
    latent = (Stream(name="latent", shape=(1, 256)),)
    assert million(latent) == pytest.approx(18.432)
    assert million((Stream(name="latent", shape=(1, 576)),)) == pytest.approx(41.472)
    scales = 36 * 2 * 10**6 / 1e9  # float16, one a token
    assert million(latent, Int(width=4)) == pytest.approx(4.608 + scales)
