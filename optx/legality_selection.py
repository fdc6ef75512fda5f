"""What is known to break where reads are selected: rows as in legality_facts.py."""

from flax import nnx

from optx.legality_facts import Finding, Intent, StepFact
from optx.nn.attention import Attention
from optx.nn.dsa import KeyIndexer
from optx.nn.nsa import NSA
from optx.nn.selecting import BlockMeans
from optx.passes.clsa import Clsa
from optx.passes.dsa import Dsa
from optx.passes.evict_kv import EvictKV
from optx.passes.kivi import Kivi
from optx.passes.moba import Moba
from optx.passes.mosa import Mosa
from optx.passes.nsa import Nsa
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.rotate import Rotate
from optx.passes.rotated_kv import RotatedKV
from optx.passes.split_key_bias import SplitKeyBias


def _selecting(intent: Intent) -> list[tuple[str, Attention]]:
    """Layers with an index over their keys or values."""
    return [(p, x) for p, x, _ in intent.sites if isinstance(x, Attention) and x.select is not None and x.select.parts]


def _keys_without_bias(intent: Intent) -> list[Finding]:
    biased = [(path, attn) for path, attn in _selecting(intent) if attn.k is not None and attn.k.bias is not None]
    return [Finding(path=path, got=str(attn.cache)) for path, attn in biased]


def _made_for_heads(intent: Intent) -> list[Finding]:
    """Rotations of heads come from passes on attention and on whole blocks."""
    layers = {path.removesuffix("/mixer") for path, *_ in intent.sites}
    mixers = [
        (p, m) for p, m in intent.mixers().items() if isinstance(m, Attention) and p.removesuffix("/mixer") in layers
    ]
    pooled = [(p, m) for p, m in mixers if isinstance(m.select, NSA) and m.select.pool_k is not None]
    indexed = [(p, m) for p, m in mixers if isinstance(m.select, KeyIndexer) and intent.pass_.options is not Rotate]
    return [
        Finding(path=path, got=f"{type(attn.select).__name__} over {attn.cache}") for path, attn in pooled + indexed
    ]


def _scaled_by_head(intent: Intent) -> list[Finding]:
    indexed = [
        (path, attn, o) for path, attn, o in intent.sites if isinstance(getattr(attn, "select", None), KeyIndexer)
    ]
    return [Finding(path=path, got=f"scale: {o.scale}") for path, _, o in indexed if o.scale == "head"]


def _beside_selection(intent: Intent) -> list[Finding]:
    """Tokens kept exact, scales that span tokens, and eviction."""
    selecting = [(path, m, o) for path, m, o in intent.sites if m.cache.select is not None]
    wrong = [
        (path, m)
        for path, m, o in selecting
        if isinstance(o, Kivi | EvictKV) or getattr(o, "first", 0) or getattr(o, "recent", 0)
    ]
    return [Finding(path=path, got=str(m.cache)) for path, m in wrong]


def _chosen_twice(intent: Intent) -> list[Finding]:
    return [Finding(path=path, got=str(x.cache)) for path, x, _ in intent.sites if x.cache.select is not None]


def _without_chooser(intent: Intent) -> list[Finding]:
    after = intent.applied()
    followers = [
        (path, m) for path, m in after.items() if m.cache.select is not None and m.cache.select.like is not None
    ]
    choosers = [(path, m, after.get(f"layers/{m.cache.select.like}/mixer")) for path, m in followers]
    return [Finding(path=path, got=f"{m.cache}") for path, m, other in choosers if not _chooses_for(other, m)]


def _chooses_for(chooser: nnx.Module | None, follower: Attention) -> bool:
    lends = isinstance(chooser, Attention) and isinstance(chooser.select, BlockMeans) and chooser.select.lends
    mine = follower.select.block, follower.select.blocks, follower.kv_heads
    return lends and mine == (chooser.select.block, chooser.select.blocks, chooser.kv_heads)


SELECTION_FACTS: tuple[StepFact, ...] = (
    StepFact(
        name="exact_tokens_beside_selection",
        of=(QuantizeKV, Kivi, RotatedKV, EvictKV),
        found=_beside_selection,
        why="queries choose among pages of one kind that hold all tokens: exact tokens beside packed ones, scales that span "
        "tokens and eviction keep others",
        fix="leave out recent and first, take a format with scales a token, or leave out the selection",
        source="arithmetic: a choice is a list of pages of one table",
        override=False,
    ),
    StepFact(
        name="selected_twice",
        of=(Moba, Nsa, Dsa, Mosa),
        found=_chosen_twice,
        why="the layer chooses what it reads already",
        fix="keep one of the passes, or give them layers of their own with 'match'",
        source="arithmetic: a step reads one list of pages a layer",
        override=False,
    ),
    StepFact(
        name="select_without_key_bias",
        of=(SplitKeyBias,),
        found=_keys_without_bias,
        why="an index over cached keys would be made of keys without their bias, and choose by other logits than attention has",
        fix="leave out split_key_bias, and keep keys in 8 bits",
        source="arithmetic: q . mean(k) lacks q . mean(R_s b)",
        override=False,
    ),
    StepFact(
        name="rotated_under_index",
        of=(RotatedKV, Rotate),
        found=_made_for_heads,
        why="keys and values would be rotated under an index that was made for them as they were",
        fix="take moba, or nsa with hidden: null, whose means rotate along, or store the cache as int8 or fp8",
        source="arithmetic: mean(x Q) = mean(x) Q, and silu(x Q W) is not silu(x W)",
        override=False,
    ),
    StepFact(
        name="no_layer_to_choose",
        of=(Clsa,),
        found=_without_chooser,
        why="the first layer of its run chooses no blocks, or others, or for other kv heads",
        fix="give moba one rule for all layers of a run, or narrow clsa with 'match'",
        source="arithmetic: a choice is a list of blocks a kv head",
        override=False,
    ),
    StepFact(
        name="index_of_scaled_heads",
        of=(QuantizeKV,),
        found=_scaled_by_head,
        why="keys of the heads would be divided by scales of their own under an index that joins the heads",
        fix="take scale: token or tensor",
        source="arithmetic: sum_g P_g k_g / s_g is no multiple of sum_g P_g k_g",
        override=False,
    ),
)
