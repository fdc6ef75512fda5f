"""The passes, in the order in which they run: the table of contents."""

from optx import registry
from optx.passes import (
    awq,
    clsa,
    distill,
    dsa,
    evict_kv,
    fuse_projections,
    gptq,
    gqa,
    kivi,
    linearize,
    lossless,
    mla,
    moba,
    mosa,
    nsa,
    oscar,
    quantize_activations,
    quantize_kv,
    quantize_weights,
    reduce_experts,
    rotate,
    rotate_online,
    share_kv,
    sliding_window,
    smoothquant,
    split_key_bias,
    trellis,
    turboquant,
    upcycle,
)

ORDER = (
    gqa,  # structure: fewer kv heads, calibrated
    upcycle,  # structure: dense MLPs as experts, calibrated
    reduce_experts,  # structure: fewer experts, calibrated
    share_kv,  # structure: one cache for several layers, calibrated
    sliding_window,  # attention: reads
    mla,  # attention: one latent for all heads, calibrated
    linearize,  # attention: a state in place of keys and values, calibrated
    moba,  # attention: reads, blocks by their mean keys
    clsa,  # attention: reads, one choice of blocks for several layers
    nsa,  # attention: reads, compressed tokens, blocks and a window
    dsa,  # attention: reads, tokens by an index over them, calibrated
    mosa,  # attention: reads, tokens that a router of each kv head keeps, calibrated
    distill,  # heal: what conversions have cost is trained back
    split_key_bias,  # fold: bits of keys, exact
    rotate,  # fold: outliers spread, offline
    smoothquant,  # fold: outliers moved into weights, calibrated
    rotate_online,  # fold: outliers spread, while the model runs
    turboquant,  # fold: bits of keys and values, rotated
    oscar,  # fold: bits of keys and values, rotated, calibrated
    awq,  # weights: bits, calibrated, a block at a time
    gptq,  # weights: bits, calibrated
    trellis,  # weights: two bits, calibrated
    quantize_weights,  # weights: bits
    quantize_activations,  # weights: bits of what meets them
    lossless,  # weights: the same numbers in fewer bits
    evict_kv,  # cache: tokens thrown away
    quantize_kv,  # cache: bits
    kivi,  # cache: bits, keys by channel
    fuse_projections,  # lower: layout
)


def in_order(stage: registry.Stage) -> list[registry.Pass]:
    """Registered passes of a stage, in order; passes that a user registered come last."""
    rank = {module.__name__: i for i, module in enumerate(ORDER)}
    found = [pass_ for pass_ in registry.PASSES.values() if pass_.stage == stage]
    return sorted(found, key=lambda pass_: rank.get(pass_.apply.__module__, len(rank)))
