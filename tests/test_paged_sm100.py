"""The Blackwell kernel of `paged_decode` and `ragged_paged_attention`: interpreted with races looked for, lowered, units and
borders of masks, what it declines."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from optx.bench.cases import paged_decode as decodes
from optx.bench.cases import ragged_paged_attention as chunks
from optx.bench.cases import registry
from optx.errors import LoweringError
from optx.formats import Int
from optx.pallas.attention.page_formats import Pages
from optx.pallas.attention.reference import Mask
from optx.pallas.ragged_paged_attention import mosaic_gpu_sm100 as kernel
from optx.tensor import is_qtensor

B200 = types.SimpleNamespace(platform="gpu", arch="sm100")
TINY = {"heads": 4, "kv_heads": 1, "head_dim": 64, "page_size": 64}
DECODES = [
    decodes.case("plain", [300, 0, 1, 129], **TINY),
    decodes.case("window", [400, 17], **TINY, mask=Mask(window=20, sinks=2), gaps=True, softcap=20.0, sink_logits=True),
    decodes.case("queries", [270, 3], **{**TINY, "kv_heads": 2}, queries=3, asked=[3, 2], dtype="float16", lists=2, gaps=True),
    decodes.case("int8", [300, 30], **TINY, mask=Mask(window=40, sinks=7, lag=9, skip=5), format=Int(width=8), gaps=True),
    decodes.case("wide", [300], **{**TINY, "head_dim": 256}),
]
CHUNKS = [
    chunks.case("plain", [70, 1, 0, 5], [30, 200, 0, 2], **TINY, padding=3),
    chunks.case("page16", [5, 80], [150, 0], **{**TINY, "page_size": 16}, mask=Mask(window=90, sinks=4), gaps=True),
]


def interpreted(case, **changes):
    args, kwargs = case.make(np.random.default_rng(0))
    q, pool = args[:2]
    stored = kernel.pages_of(pool.format if is_qtensor(pool) else None)
    tiles = kernel.tiles_for(q.shape[-1], stored, 1, 2, case.op == "paged_decode")
    tiles = dataclasses.replace(tiles, stages=2 if q.shape[-1] < 256 else 1, interpreted=True, **changes)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.block_until_ready(getattr(kernel, case.op)(*args, **kwargs, tiles=tiles))
    assert not gpu_callbacks.get_races().races_found
    return registry.errors(case, found, registry.reference(case.op, args, kwargs), kwargs)


@pytest.mark.parametrize("case", DECODES + CHUNKS, ids=lambda case: f"{case.op}-{case.name}")
def test_interpreted(case):
    assert max(interpreted(case)) < case.tolerance
