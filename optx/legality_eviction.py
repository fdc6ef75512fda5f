"""What is known to break where cached tokens are thrown away: rows as in legality_facts.py."""

from collections.abc import Sequence

from flax import nnx

from optx.legality_facts import Finding, Intent, StepFact, TreeFact
from optx.passes.evict_kv import EvictKV
from optx.passes.kivi import Kivi
from optx.passes.quantize_kv import QuantizeKV


def _windows_alone(intent: Intent) -> Sequence[Finding]:
    windowed = [(path, attn.cache) for path, attn, _ in intent.sites if attn.cache.window is not None]
    found = [Finding(path=path, got=str(cache)) for path, cache in windowed]
    return found if len(found) == len(intent.sites) else []


def _other_tokens_read(intent: Intent) -> Sequence[Finding]:
    if all(mixer.cache.share is None for mixer in intent.mixers().values()):
        return []
    after = intent.applied()
    readers = [(path, mixer.cache) for path, mixer in after.items() if mixer.cache.share is not None]
    apart = [
        (path, cache) for path, cache in readers if cache.evict != after[f"layers/{cache.share}/mixer"].cache.evict
    ]
    return [Finding(path=path, got=str(cache)) for path, cache in apart]


def _exact_beside_packed(intent: Intent) -> Sequence[Finding]:
    """Either pass may come first."""
    evicts = {path: isinstance(o, EvictKV) or attn.cache.evict is not None for path, attn, o in intent.sites}
    exact = {
        path: attn.cache.near is not None or isinstance(o, Kivi) or getattr(o, "first", 0) or getattr(o, "recent", 0)
        for path, attn, o in intent.sites
        if not isinstance(o, EvictKV) or attn.cache.near is not None
    }
    return [Finding(path=p, got=str(attn.cache)) for p, attn, _ in intent.sites if evicts[p] and exact.get(p)]


def _split_keys(intent: Intent) -> Sequence[Finding]:
    split = [(path, attn) for path, attn, _ in intent.sites if attn.key_bias is not None]
    return [Finding(path=path, got=f"{attn.cache}, keys without their bias") for path, attn in split]


def _mixers(model: nnx.Module) -> list[tuple[str, nnx.Module]]:
    return [(f"layers/{i}/mixer", layer.mixer) for i, layer in enumerate(model.layers) if layer.mixer is not None]


def _first_tokens_lost(model: nnx.Module) -> Sequence[Finding]:
    newest = [(p, m) for p, m in _mixers(model) if m.cache.evict is not None and m.cache.evict.reindexed]
    return [Finding(path=p, got=str(m.cache)) for p, m in newest if not m.cache.evict.sinks and m.sinks is None]


def _cannot_step_back(model: nnx.Module) -> Sequence[Finding]:
    specs = [(path, mixer.cache) for path, mixer in _mixers(model)]
    parts = {spec.evict.part for _, spec in specs if spec.evict is not None and spec.evict.replays}
    windows = [path for path, spec in specs if spec.evict is None and spec.window is not None and spec.near is None]
    fed = [path for path, spec in specs if spec.evict is not None and spec.evict.replays and {spec.evict.part} == parts]
    return [Finding(path=path, got=str(spec)) for path, spec in specs if path not in {*windows, *fed}] if parts else []


EVICTION_STEPS: tuple[StepFact, ...] = (
    StepFact(
        name="evict_beside_exact_tokens",
        of=(EvictKV, QuantizeKV, Kivi),
        found=_exact_beside_packed,
        why="eviction moves tokens one by one, and exact tokens beside packed ones, or scales that tokens share, stay behind",
        fix="leave out recent, first and formats whose scales span tokens, or the eviction",
        source="arithmetic: a group of tokens has one scale, and its tokens would part",
        override=False,
    ),
    StepFact(
        name="evict_under_split_keys",
        of=(EvictKV,),
        found=_split_keys,
        why="keys get their bias at the position where they are read, and after an eviction slots stand for positions",
        fix="leave out split_key_bias, and keep keys in 8 bits",
        source="arithmetic: R_s b is not R_t b for a slot s that is not the position t",
        override=False,
    ),
    StepFact(
        name="evict_under_windows",
        of=(EvictKV,),
        found=_windows_alone,
        why="every layer that the pass takes keeps no more than its window already, so nothing would change",
        fix="take the pass out of the recipe",
        source="arithmetic: tokens that a window has passed are gone",
        override=False,
    ),
    StepFact(
        name="evict_over_shared_cache",
        of=(EvictKV,),
        found=_other_tokens_read,
        why="the layer reads the cache of another, which would keep other tokens",
        fix="give evict_kv one rule for both layers",
        source="arithmetic: two layers read one page table, and one policy says what lies in it",
        override=False,
    ),
)

EVICTION_TREES: tuple[TreeFact, ...] = (
    TreeFact(
        name="stream_without_sinks",
        found=_first_tokens_lost,
        why="the first tokens are thrown away, on which heads trained with full attention put what they do not need",
        fix="keep sinks: 4",
        source="StreamingLLM, arXiv:2309.17453, table 1: Llama-2-13B perplexity 5.40 with 4 sinks, 5,158 without",
    ),
    TreeFact(
        name="repetition_cannot_step_back",
        found=_cannot_step_back,
        why="the prompt is fed again through all layers before it is compacted, and dropped afterwards: a state cannot go back "
        "to where it was, and under another policy, or none but a window's, there is no room for it",
        fix="give all layers without a window one kvzip, or take snapkv, which feeds nothing again",
        source="arithmetic: a state is a sum over all tokens; KVzip, arXiv:2505.23416, is for full attention",
        override=False,
    ),
)
