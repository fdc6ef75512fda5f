"""What is known to break, as data: each fact with its reason, its fix and the source that shows it.

A `StepFact` is read off a tree and what a pass is about to do to it, a `TreeFact` off the tree that a recipe made. A new one is
a function and a row of `STEP_FACTS` or `TREE_FACTS`; nothing else names it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from flax import nnx

from optx import ir, pipeline
from optx.cache import CacheSpec
from optx.errors import FormatError
from optx.formats import Format
from optx.nn.attention import Attention
from optx.nn.core import Linear
from optx.nn.mla import MLA
from optx.nn.moe import GroupedLinear, Router
from optx.passes.evict_kv import EvictKV
from optx.passes.kivi import Kivi
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.rotate import Rotate, unrotatable
from optx.passes.rotated_kv import RotatedKV
from optx.passes.sliding_window import SlidingWindow
from optx.passes.trellis import TrellisOptions
from optx.registry import Pass, PassOptions, Site, Stage
from optx.tensor import Tensor, is_packed, is_qtensor

LEAST_ROUTER, LEAST_KEYS, LEAST_TIED = 8, 8, 4  # bits a number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One place at which a fact holds."""

    path: str
    got: str  # what stands there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A refusal. The texts are clauses without a full stop."""

    name: str
    why: str
    fix: str
    source: str  # paper, report or measurement; or the arithmetic that shows it
    override: bool = True  # `allow: [name]` in the recipe lets it pass; False: the pass could not run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intent:
    """A pass about to run: `tree` is what it meets, abstract; `rules` its options, the first that fits a site wins."""

    pass_: Pass
    rules: pipeline.Rules
    tree: nnx.Module

    @functools.cached_property
    def sites(self) -> tuple[tuple[str, nnx.Module, PassOptions], ...]:
        """Where the pass will be applied, as (path, module, options)."""
        taken = pipeline.matches(self.tree, self.pass_, self.rules)
        return tuple((path, ir.get(self.tree, path), options) for path, _, options in taken)

    def mixers(self) -> dict[str, nnx.Module]:
        """The tree's token mixers by path."""
        return {f"layers/{i}/mixer": x.mixer for i, x in enumerate(self.tree.layers) if x.mixer is not None}

    def applied(self) -> dict[str, nnx.Module]:
        """The mixers as the pass will leave them. Raises PassError where the pass does."""
        layers, after = len(self.tree.layers), self.mixers()
        for path, module, options in self.sites:
            new = self.pass_.apply(Site(path=path, layers=layers), module, options)
            after |= {path: new} if isinstance(new, nnx.Module) else {}
        return after


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFact(Fact):
    """Read before a pass of options `of` runs."""

    of: tuple[type[PassOptions], ...]
    found: Callable[[Intent], Sequence[Finding]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeFact(Fact):
    """Read off the tree after all passes."""

    found: Callable[[nnx.Module], Sequence[Finding]]


def key_bias(module: nnx.Module) -> bool:
    """Whether the keys that a layer caches have a bias in them."""
    linear = getattr(module, "qkv", None) or getattr(module, "k", None)
    there = isinstance(module, Attention) and linear is not None and linear.bias is not None
    return there and module.key_bias is None


def _cache(path: str, spec: CacheSpec) -> Finding:
    return Finding(path=path, got=str(spec))


def _tensor(path: str, x: Tensor) -> Finding:
    return Finding(path=path, got=ir.tensor_text(x))


def _packed_weights(intent: Intent) -> Iterator[tuple[str, PassOptions, object]]:
    for path, module, options in intent.sites:
        for where, variable in ir.params(module).items():
            if is_packed(variable.get_value()):
                yield f"{path}/{where}", options, variable.get_value()


def _packed_twice(intent: Intent) -> list[Finding]:
    return [_tensor(path, weight) for path, options, weight in _packed_weights(intent) if not options.requantize]


def _packed_before_fold(intent: Intent) -> list[Finding]:
    early = intent.pass_.stage in (Stage.STRUCTURE, Stage.HEAL, Stage.FOLD)
    return [_tensor(path, weight) for path, _, weight in _packed_weights(intent)] if early else []


def _does_not_divide(options: QuantizeWeights | TrellisOptions, length: int) -> str | None:
    try:
        return options.storage().check(length)
    except FormatError:  # no format at all: the pass says what is wrong with its options
        return None


def _weights_do_not_divide(intent: Intent) -> list[Finding]:
    parts = [(f"{path}/{p}".strip("/"), part, o) for path, module, o in intent.sites for p, part in ir.walk(module)]
    weights = [
        (path, part.weight.get_value(), o) for path, part, o in parts if isinstance(part, Linear | GroupedLinear)
    ]
    reasons = [(path, weight, _does_not_divide(options, weight.shape[-2])) for path, weight, options in weights]
    return [Finding(path=path, got=f"{ir.tensor_text(x)}: {reason}") for path, x, reason in reasons if reason]


def _heads_do_not_divide(intent: Intent) -> list[Finding]:
    found = []
    for path, attn, options in intent.sites:
        formats = _kv_formats(options, attn) if attn.cache.share is None else {}
        for stream in attn.cache.streams:
            if stream.name in formats and (reason := formats[stream.name].check(stream.shape[-1])):
                found.append(Finding(path=path, got=f"{stream.name}{list(stream.shape)}: {reason}"))
    return found


def _kv_formats(options: QuantizeKV | Kivi, attn: Attention | MLA) -> dict[str, Format]:
    try:
        return options.formats(attn)
    except FormatError:  # no format at all: the pass says what is wrong with its options
        return {}


def _cache_packed_twice(intent: Intent) -> list[Finding]:
    own = ((path, attn.cache) for path, attn, _ in intent.sites if attn.cache.share is None)
    return [_cache(path, cache) for path, cache in own if cache.packed]


def _no_token_cache(intent: Intent) -> list[Finding]:
    mixers = intent.mixers()
    held = any(mixer.cache.holds_tokens for mixer in mixers.values())
    return [] if held else [_cache(path, mixer.cache) for path, mixer in mixers.items()]


def _latents_alone(intent: Intent) -> list[Finding]:
    mixers = intent.mixers()
    latents = [_cache(path, mixer.cache) for path, mixer in mixers.items() if isinstance(mixer, MLA)]
    return [] if any(isinstance(mixer, intent.pass_.module) for mixer in mixers.values()) else latents


def _windowed_already(intent: Intent) -> list[Finding]:
    sites = [(path, attn.cache, options.window) for path, attn, options in intent.sites]
    near = [_cache(path, cache) for path, cache, window in sites if cache.window and cache.window <= window]
    return near if len(near) == len(sites) else []


def _no_sinks_left(intent: Intent) -> list[Finding]:
    before, after = intent.mixers(), intent.applied()
    attention = {path: new for path, new in after.items() if isinstance(new, Attention)}
    if any(new.cache.window is None for new in attention.values()):
        return []
    cut = {path: new for path, new in attention.items() if before[path].cache.window is None}
    return [_cache(path, new.cache) for path, new in cut.items() if not new.cache.sinks and new.sinks is None]


def _one_window_a_table(intent: Intent) -> list[Finding]:
    after = intent.applied()
    readers = ((path, mixer.cache) for path, mixer in after.items() if mixer.cache.share is not None)
    owners = ((path, spec, after[f"layers/{spec.share}/mixer"].cache) for path, spec in readers)
    return [_cache(path, spec) for path, spec, owner in owners if spec.table_key != owner.table_key]


def _stream_does_not_rotate(intent: Intent) -> list[Finding]:
    layers = [(p, block, o) for p, block, o in intent.sites if p.startswith("layers/")]
    reasons = [(path, unrotatable(block, options)) for path, block, options in layers]
    return [Finding(path=path, got=reason) for path, reason in reasons if reason]


def _rotated_in_part(intent: Intent) -> list[Finding]:
    chosen = {path: dataclasses.replace(options, match=None) for path, _, options in intent.sites}
    ways = [(path, chosen.get(path)) for path in (f"layers/{i}" for i in range(len(intent.tree.layers)))]
    differ = [(path, way) for path, way in ways if way != ways[0][1]]
    return [Finding(path=path, got="left as it is" if way is None else str(way)) for path, way in differ]


def _low_bit_keys_under_bias(model: nnx.Module) -> list[Finding]:
    modules = [(path, module) for path, module in ir.walk(model) if key_bias(module)]
    return [_cache(path, m.cache) for path, m in modules if _width(m.cache.formats[0]) < LEAST_KEYS]


def _two_bits_for_a_group(model: nnx.Module) -> list[Finding]:
    mixers = [(f"layers/{i}/mixer", layer.mixer) for i, layer in enumerate(model.layers)]
    shared = [(p, m) for p, m in mixers if isinstance(m, MLA) or isinstance(m, Attention) and m.heads > m.kv_heads]
    return [_cache(path, mixer.cache) for path, mixer in shared if min(map(_width, mixer.cache.formats)) <= 2]


def _width(format_: Format | None) -> int:
    """Bits of its codes where those are integers; else 8."""
    return getattr(format_, "width", 8)


def _low_bit_router(model: nnx.Module) -> list[Finding]:
    weights = [(path, module.weight.get_value()) for path, module in ir.walk(model) if isinstance(module, Router)]
    return [_tensor(path, x) for path, x in weights if is_qtensor(x) and x.bits_per_weight < LEAST_ROUTER]


def _low_bit_tied_table(model: nnx.Module) -> list[Finding]:
    table = model.embed.table.get_value()
    low = model.output is None and is_qtensor(table) and table.bits_per_weight < LEAST_TIED
    return [_tensor("embed", table)] if low else []


STEP_FACTS: tuple[StepFact, ...] = (
    StepFact(
        name="packed_twice",
        of=(QuantizeWeights, TrellisOptions),
        found=_packed_twice,
        why="the weight is packed already, and the error of a second rounding adds to that of the first",
        fix="load with weights='dense', narrow 'match', or set requantize: true",
        source="llama.cpp, llama-quantize --allow-requantize: 'can severely reduce quality compared to quantizing from 16bit'",
        override=False,
    ),
    StepFact(
        name="packed_before_fold",
        of=(PassOptions,),
        found=_packed_before_fold,
        why="the pass computes new weights from rounded ones, whose error it spreads and which must be rounded once more",
        fix="load with weights='dense', so that weights are rounded after it",
        source="arithmetic: (W + E) R = W R + E R, and E R does not lie on the grid; QuaRot, arXiv:2404.00456, rotates first",
    ),
    StepFact(
        name="weights_do_not_divide",
        of=(QuantizeWeights, TrellisOptions),
        found=_weights_do_not_divide,
        why="the contracted axis does not divide into the groups or bytes of the format",
        fix="take a group or a width that divides it, or keep the site out with 'match'",
        source="arithmetic: a scale stands for `group` numbers, a byte for 8 / width of them",
        override=False,
    ),
    StepFact(
        name="heads_do_not_divide",
        of=(QuantizeKV, Kivi, RotatedKV),
        found=_heads_do_not_divide,
        why="a head's numbers do not divide into the bytes of the format",
        fix="take int8 or fp8 for the cache",
        source="arithmetic: a byte holds 8 / width numbers of one token and head",
        override=False,
    ),
    StepFact(
        name="cache_packed_twice",
        of=(QuantizeKV, Kivi, RotatedKV),
        found=_cache_packed_twice,
        why="the cache is stored in a format already, and a token is rounded once, when it is written",
        fix="give the site one rule, or set the format where the cache is built",
        source="arithmetic: a stream has one format, CacheSpec.format",
        override=False,
    ),
    StepFact(
        name="no_token_cache",
        of=(EvictKV, QuantizeKV, Kivi, SlidingWindow, RotatedKV),
        found=_no_token_cache,
        why="every layer keeps a state of fixed size and no tokens, so there is nothing that grows with the context",
        fix="take the pass out of the recipe",
        source="arithmetic: bytes of a state are a row's, not a token's (Mamba, arXiv:2312.00752)",
        override=False,
    ),
    StepFact(
        name="latents_alone",
        of=(EvictKV, Kivi, SlidingWindow, RotatedKV),
        found=_latents_alone,
        why="the pass rewrites keys and values by head, and this model caches one latent for all heads",
        fix="take the pass out of the recipe",
        source="DeepSeek-V2, arXiv:2405.04434: keys and values of every head are projections of the latent",
        override=False,
    ),
    StepFact(
        name="windowed_already",
        of=(SlidingWindow,),
        found=_windowed_already,
        why="every layer that the pass takes sees no more than its window already, so nothing would change",
        fix="take the pass out of the recipe, or set a window smaller than the model's",
        source="arithmetic: a window inside a window",
        override=False,
    ),
    StepFact(
        name="window_without_sinks",
        of=(SlidingWindow,),
        found=_no_sinks_left,
        why="no layer would see the first tokens, on which heads trained with full attention put what they do not need",
        fix="keep sinks: 4, or leave some layers global with keep_every",
        source="StreamingLLM, arXiv:2309.17453, table 1: Llama-2-13B perplexity 5.40 with 4 sinks, 5,158 without",
    ),
    StepFact(
        name="window_over_shared_cache",
        of=(SlidingWindow,),
        found=_one_window_a_table,
        why="the layer reads the cache of another, which would keep other tokens",
        fix="give both layers the same window, or neither",
        source="arithmetic: two layers read one page table, and pages that passed one window are freed for both",
        override=False,
    ),
    StepFact(
        name="stream_does_not_rotate",
        of=(Rotate,),
        found=_stream_does_not_rotate,
        why="a rotated stream has to give the same numbers at every part that reads or writes it",
        fix="set stream: false, which rotates the values of heads alone, or take the pass out of the recipe",
        source="arithmetic: norm(x Q) diag(g) = norm(x) Q diag(g), which is norm(x) diag(g) Q for equal gains only; QuaRot, "
        "arXiv:2404.00456, section 3.1",
        override=False,
    ),
    StepFact(
        name="rotated_in_part",
        of=(Rotate,),
        found=_rotated_in_part,
        why="all layers read and write one stream, so all of them are rotated by one matrix or none is",
        fix="give rotate one rule without 'match'",
        source="arithmetic: x Q + y is no rotation of x + y",
        override=False,
    ),
)

TREE_FACTS: tuple[TreeFact, ...] = (
    TreeFact(
        name="k_bias_low_bit_kv",
        found=_low_bit_keys_under_bias,
        why="a key bias puts a constant as large as the signal under the scale, and keys below 8 bits lose the signal",
        fix="split the bias off first (fold: - pass: split_key_bias), or use int8 or fp8 for the cache",
        source="llama.cpp issue 21385: Qwen2.5-7B with keys of 3 bits, perplexity 7.52 -> 9,410; of 26 models all that fail have "
        "a large key bias",
    ),
    TreeFact(
        name="gqa_kivi2",
        found=_two_bits_for_a_group,
        why="several query heads read one rounded head or latent, and 2 bits are too few for all of them",
        fix="use 4 bits or more for the cache",
        source="KIVI, arXiv:2402.02750, LongBench of its repository: Mistral-7B-v0.2 passage retrieval 89.3 -> 80.8 at 2 bits, "
        "mean 43.54 -> 43.53 at 4",
    ),
    TreeFact(
        name="low_bit_router",
        found=_low_bit_router,
        why="a rounded router sends tokens to other experts, an error that no expert can mend, and saves next to nothing",
        fix="keep the router dense, or at 8 bits",
        source="llama.cpp, llama-quant.cpp: expert gating tensors are never quantized",
    ),
    TreeFact(
        name="low_bit_tied_head",
        found=_low_bit_tied_table,
        why="the table is the head too, and what is rounded there goes into the logits with no layer after it",
        fix="keep the table dense, or at 4 bits and more",
        source="llama.cpp, llama-quant.cpp: a table that is the output too gets 5 to 8 bits in mixtures of 2 to 4",
    ),
)
