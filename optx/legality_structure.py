"""What is known to break where heads are pooled and caches shared: rows as in legality_facts.py."""

from flax import nnx

from optx.legality_facts import Finding, Intent, StepFact
from optx.nn.attention import Attention
from optx.passes.gqa import Gqa
from optx.passes.linearize import Linearize
from optx.passes.mla import Mla
from optx.passes.reduce_experts import ReduceExperts, too_few
from optx.passes.share_kv import ShareKV


def _reads_other_heads(intent: Intent) -> list[Finding]:
    after = intent.applied()
    readers = [(path, x, f"layers/{x.cache.share}/mixer") for path, x in after.items() if x.cache.share is not None]
    reasons = [(path, _differ(mixer, after.get(owner), owner)) for path, mixer, owner in readers]
    return [Finding(path=path, got=reason) for path, reason in reasons if reason]


def _differ(reader: Attention, owner: nnx.Module | None, where: str) -> str | None:
    """What keeps a layer from reading the cache of `owner`, which stands at `where`."""
    if not isinstance(owner, Attention):
        return f"{where} has no keys and values: {type(owner).__name__}"
    if owner.cache.share is not None:
        return f"{where} has no cache of its own, it is {owner.cache}"
    for name in ("kv_heads", "head_dim", "rope"):
        mine, its = getattr(reader, name), getattr(owner, name)
        if mine != its:
            return f"{name} {mine}, but {its} at {where}"
    if reader.cache.table_key != owner.cache.table_key:
        return f"{reader.cache}, but {owner.cache} at {where}"
    return None


def _too_few_experts(intent: Intent) -> list[Finding]:
    """The router of merged experts stays as it is."""
    pruned = [(path, moe.router, options) for path, moe, options in intent.sites if options.how == "prune"]
    reasons = [(path, too_few(router, options.count(path, router.experts))) for path, router, options in pruned]
    return [Finding(path=path, got=reason) for path, reason in reasons if reason]


STRUCTURE_FACTS: tuple[StepFact, ...] = (
    StepFact(
        name="fewer_experts_than_a_token_takes",
        of=(ReduceExperts,),
        found=_too_few_experts,
        why="the router could not choose as many experts as a token takes",
        fix="keep more",
        source="arithmetic: a top-k of fewer than k",
        override=False,
    ),
    StepFact(
        name="reads_other_heads",
        of=(Gqa, Mla, ShareKV, Linearize),
        found=_reads_other_heads,
        why="the layer would read the cache of one whose heads, positions or window are not its own",
        fix="narrow the pass with 'match' to layers that are alike, or convert the layer whose cache is read the same way",
        source="arithmetic: q . k wants one head size, one rotary embedding and one set of tokens; CLA, arXiv:2405.12981, shares "
        "between equal layers",
        override=False,
    ),
)
