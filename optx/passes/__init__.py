"""The passes, in the order in which they run: the table of contents."""

from optx import registry
from optx.passes import fuse_projections, gptq, quantize_kv, quantize_weights, sliding_window

ORDER = (
    sliding_window,  # attention: reads
    gptq,  # weights: bits, calibrated
    quantize_weights,  # weights: bits
    quantize_kv,  # cache: bits
    fuse_projections,  # lower: layout
)


def in_order(stage: registry.Stage) -> list[registry.Pass]:
    """Registered passes of a stage, in order; passes that a user registered come last."""
    rank = {module.__name__: i for i, module in enumerate(ORDER)}
    found = [pass_ for pass_ in registry.PASSES.values() if pass_.stage == stage]
    return sorted(found, key=lambda pass_: rank.get(pass_.apply.__module__, len(rank)))
