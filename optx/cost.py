"""What a step of a model reads, writes and computes, op by op, off the tree's shapes: weights as stored (scales and zero points
included), caches as their specs keep them, experts as many as a batch is expected to take, attention by its mask.

A multiply-add is two operations. That matters when figures are compared: for Qwen3-8B the prefill of 40,960 tokens is
1,064 TFLOP here, 569 of linear layers and 495 of causal attention. The ~750 that are often quoted count a multiply-add of the
linear part once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from optx import ir, tensor
from optx.cache import CachePlan, CacheSpec
from optx.selection import Selection as Selection
from optx.target import Target

MULTIPLIED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # type of activations: field of Peak

CODES = {"int8": "int8", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}  # type of both operands' codes: field of Peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCost:
    """One part of a step. Bytes of weights and caches that are read, bytes of caches that are written, operations."""

    path: str  # in the tree
    op: str  # matmul, experts, head, vectors, attention, state
    format: str  # weights or cache are stored in
    dtype: str  # multiplied in: a field of Peak
    weights: float = 0
    cache: float = 0
    written: float = 0
    flops: float = 0

    @property
    def bytes(self) -> float:
        return self.weights + self.cache + self.written

    @property
    def layer(self) -> int | None:
        match = re.match(r"layers/(\d+)", self.path)
        return int(match[1]) if match else None

    def seconds(self, target: Target) -> float | None:
        """Lower bound: the later of memory (bytes / bandwidth) and compute (operations / peak); a wall of unknown height does
        not count. None where the bandwidth is not known."""
        if not target.bandwidth:
            return None
        peak = getattr(target.peak, self.dtype)
        return max(self.bytes / target.bandwidth, self.flops / peak if peak else 0)


# Operations a token of a recurrence in its one-step form, from the facts of its call site: a number of the state is decayed (1),
# gets an outer product added (2) and is multiplied into the output (2); the delta rule reads it once more (2). Chunked
# forms of a prefill do more, on faster units.
RECURRENCES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "ssm_scan": lambda f: 5 * f["heads"] * f["head_dim"] * f["state_dim"],
    "selective_scan": lambda f: 5 * f["inner"] * f["state_dim"],
    "linear_attention": lambda f: 5 * f["heads"] * f["key_dim"] * f["value_dim"],
    "gated_delta": lambda f: 7 * f["heads"] * f["key_dim"] * f["head_dim"],
}


def step_ops(tree: nnx.Module, *, batch: int = 1, tokens: int = 1, context: int = 1) -> tuple[OpCost, ...]:
    """A step in which each of `batch` rows appends `tokens` tokens, the last of which sees `context` tokens, itself included.

    tokens 1: decode; tokens = context: the prefill of whole prompts. The head runs for a row's last token; a draft module
    is not run, and rows looked up in an embedding are not counted.
    """
    plan = tree.cache_plan()
    mixers = [
        _mixer_cost(f"layers/{i}/mixer", layer.mixer, plan, i, (batch, tokens, context))
        for i, layer in enumerate(tree.layers)
        if layer.mixer is not None
    ]
    return (*_weights(tree, batch, tokens), *mixers)


def _weights(tree, batch, tokens) -> Iterator[OpCost]:
    head = tree.embed if tree.output is None else tree.output
    left_out = {id(m) for part in (tree.draft, tree.embed) if part not in (None, head) for _, m in ir.walk(part)}
    seen: set[int] = set()
    shares: dict[str, float] = {}
    for path, module in ir.walk(tree):
        share = getattr(module, "active", 1.0)
        shares[path] = share if share < 1 else shares.get(_parent(path), 1.0)
        own = {n: v for n, v in vars(module).items() if issubclass(type(v), nnx.Variable) and id(v) not in seen}
        if id(module) in left_out or not own:
            continue
        seen |= {id(v) for v in own.values()}
        rows = batch if module is head else batch * tokens
        activations = getattr(module, "activations", None)
        values = {n: v.get_raw_value() for n, v in own.items()}
        yield _weight_cost(path, values, rows, shares[path], module is head, activations)


def _parent(path: str) -> str:
    """`layers/3/mlp` of `layers/3/mlp/up`; '' of `layers/3`, of which `layers` is a list."""
    above = path.rpartition("/")[0]
    return "" if above.count("/") == 0 else above


def _weight_cost(path, values, rows, share, head, activations) -> OpCost:
    """share: of the module that one token takes, as many tokens as `rows` being expected to take 1 - (1 - share)^rows."""
    matrices = {name: x for name, x in values.items() if len(x.shape) > 1}
    main = max(matrices.values() or values.values(), key=lambda x: math.prod(x.shape))
    contracted = matrices.keys() & {"weight", "table"}
    op = "head" if head else "vectors" if not contracted else "experts" if share < 1 else "matmul"
    met = 1 - (1 - share) ** rows
    return OpCost(
        path=path,
        op=op,
        format=str(main.format) if tensor.is_packed(main) else np.dtype(main.dtype).name,
        dtype=_unit(main, activations),
        weights=met * sum(tensor.nbytes(x) for x in values.values()),
        flops=2.0 * rows * share * sum(math.prod(x.shape) for x in matrices.values()),
    )


def _unit(weight: tensor.Tensor, activations) -> str:
    """The field of Peak at which x is multiplied: that of 8-bit codes where both sides have them."""
    plain = MULTIPLIED.get(np.dtype(weight.dtype).name, "fp32")
    if activations is None:
        return plain
    weight = tensor.canonical(weight)
    alike = type(activations) is type(weight.format)
    return CODES.get(np.dtype(weight.data.dtype).name, plain) if alike else plain


def _mixer_cost(path, mixer, plan: CachePlan, layer: int, step) -> OpCost:
    batch, tokens, context = step
    spec, owner = plan.specs[layer], plan.specs[plan.owner(layer)]
    facts = {site.op: site.args for site in mixer.op_sites()}
    index = facts.get("indexed_attention")
    written = batch * sum(map(_unit_bytes, spec.parts)) * (tokens if spec.holds_tokens else 1)
    common = {"path": path, "format": spec.storage, "written": written}
    if not spec.holds_tokens:
        flops = batch * tokens * sum(RECURRENCES[op](args) for op, args in facts.items() if op in RECURRENCES)
        return OpCost(**common, op="state", dtype="fp32", cache=batch * _unit_bytes(owner), flops=flops)
    chooses = index is not None and context > index["top_k"]
    attention = facts["paged_decode" if tokens == 1 or chooses else "flash_attention"]
    flops = _attention_flops(attention, spec, tokens, context, index if chooses else None)
    cache = batch * row_read(owner, context, tokens, index)
    return OpCost(
        **common, op="attention", dtype=MULTIPLIED.get(attention["dtype"], "fp32"), cache=cache, flops=batch * flops
    )


def _attention_flops(facts, spec: CacheSpec, tokens, context, index) -> float:
    """Scores and weighted sum, 2 N (Hk + Hv) a pair of a token and a cached token that it sees; with an index, 2 N H a
    pair of it on top."""
    seen = visible(spec, context, tokens)
    if spec.select is not None:
        return _selected_flops(facts, spec, tokens, context)
    chosen = seen if index is None else min(index["top_k"], seen or context)
    each = 2 * facts["heads"] * (facts["head_dim"] + facts["value_dim"])
    flops = each * pairs(tokens, context, chosen)
    return (
        flops if index is None else flops + 2 * index["index_heads"] * index["index_dim"] * pairs(tokens, context, seen)
    )


def _selected_flops(facts, spec: CacheSpec, tokens, context) -> float:
    """What is chosen as above, and 2 N a pair of a token and a number of an entry of the index that it may see."""
    each, chosen = 2 * facts["heads"] * (facts["head_dim"] + facts["value_dim"]), spec.select.chosen(context)
    if chosen >= context:
        return each * pairs(tokens, context)
    scored = sum(stream.shape[-1] / stream.every for stream in spec.index)
    return each * pairs(tokens, context, chosen) + 2 * facts["heads"] * scored * pairs(tokens, context)


def visible(spec: CacheSpec, context: int, tokens: int) -> int | None:
    """Tokens that one of the last `tokens` of `context` sees at most; None: all before it. A prompt that is compacted at its end
    sees all of itself until then."""
    if spec.window is not None:
        return spec.window + spec.sinks
    whole = spec.evict is None or (spec.evict.once and tokens > 1)
    return None if whole else spec.evict.held(context)


def pairs(tokens: int, context: int, seen: int | None = None) -> int:
    """Pairs of one of the last `tokens` tokens of `context` with itself or an earlier token, at most `seen` each."""

    def up_to(last: int) -> int:  # sum of min(i, seen) for i = 1..last
        whole = last if seen is None else min(last, seen)
        return whole * (whole + 1) // 2 + (last - whole) * (seen or 0)

    return up_to(context) - up_to(context - tokens)


def row_read(spec: CacheSpec, context: int, tokens: int = 1, index: Mapping[str, Any] | None = None) -> float:
    """Bytes of one row's cache that a step reads: what its mask lets any of the `tokens` newest tokens see; with an index that
    leaves some out, its stream for all of those and the others for the tokens chosen."""
    return sum(_part_read(part, context, tokens, index) for part in spec.parts)


def _part_read(spec: CacheSpec, context: int, tokens: int, index: Mapping[str, Any] | None) -> float:
    most = visible(spec, context, tokens)
    kept = context if most is None else min(context, most + tokens - 1)
    if spec.select is not None:
        of_index = sum(map(spec.stream_bytes, spec.index))
        chosen = spec.select.chosen(context)
        always = spec.select.stride or spec.select.masked  # compressed tokens and masks are read in any case
        scored = kept if kept > chosen or always else 0
        return of_index * scored + (_unit_bytes(spec) - of_index) * min(kept, tokens * chosen)
    if index is None:
        return _unit_bytes(spec) * kept
    of_index = _unit_bytes(spec.replace(streams=tuple(s for s in spec.streams if s.name == index["index"])))
    scored = kept if kept > index["top_k"] else 0
    return of_index * scored + (_unit_bytes(spec) - of_index) * min(kept, tokens * index["top_k"])


@functools.cache
def _unit_bytes(spec: CacheSpec) -> float:
    """`unit_bytes`, which traces the format's encoder."""
    return spec.unit_bytes


def held(spec: CacheSpec, rows: int, context: int) -> float:
    """Bytes of a layer's cache for `rows` rows of `context` tokens: `CacheSpec.bytes`."""
    return rows * sum(_unit_bytes(part) * (part.tokens(context) if part.holds_tokens else 1) for part in spec.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBytes:
    """One decode step: a new token for each of `batch` sequences of `context` tokens."""

    batch: int
    context: int
    weights: int  # read
    kv: float  # read; metadata and states included
    kv_token: float  # that one more token takes for good; states do not grow
    held: float  # in memory: all weights, and the caches of all sequences
    unread: int = 0  # weights that the step leaves alone but for single rows: an untied input embedding

    @property
    def total(self) -> float:
        """Bytes read."""
        return self.weights + self.kv

    def seconds(self, target: Target) -> float | None:
        """Lower bound of the step's time, bytes / bandwidth; None where the bandwidth is not known."""
        return self.total / target.bandwidth if target.bandwidth else None

    def to_dict(self) -> dict:
        return {
            "weights_read": self.weights,
            "kv_read": self.kv,
            "total": self.total,
            "kv_per_token": self.kv_token,
            "memory": self.held,
            "embedding": self.unread,
        }


def step_bytes(tree: nnx.Module, batch: int = 1, context: int = 1) -> StepBytes:
    """The step's bytes on a concrete or abstract tree."""
    specs = [spec for spec in tree.cache_plan().specs if spec is not None]
    return StepBytes(
        batch=batch,
        context=context,
        weights=weights_read(tree, batch),
        kv=sum(op.cache for op in step_ops(tree, batch=batch, context=context)),
        kv_token=sum(_unit_bytes(spec) for spec in specs if spec.holds_tokens),
        held=ir.weight_bytes(tree) + sum(held(spec, batch, context) for spec in specs),
        unread=0 if tree.output is None else ir.weight_bytes(tree.embed),
    )


def weights_read(tree: nnx.Module, batch: int = 1) -> int:
    """Weight bytes that one decode step reads: all but the rows of an untied input embedding, and of experts those that some
    of the `batch` tokens take, as many as uniform routing makes expect. A draft module is not run."""
    unread = [part for part in (tree.draft, tree.output and tree.embed) if part is not None]
    return ir.active_bytes(tree, batch) - sum(ir.active_bytes(part, batch) for part in unread)
