"""Cached tokens thrown away: a policy of eviction on chosen layers."""

import dataclasses
from typing import Literal

from optx.errors import FormatError, PassError, did_you_mean
from optx.eviction import POLICIES, Policy
from optx.ir import replace
from optx.nn.attention import Attention
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictKV(PassOptions):
    """Fields after `policy` are those of the policy (`optx.eviction`); None: its own default."""

    policy: str  # streaming_llm, h2o, tova, snapkv, kvzip
    budget: int | None = None  # tokens that a row keeps
    ratio: float | None = None  # in place of it, for policies that compact a prompt at its end: share of the prompt
    sinks: int | None = None  # first tokens, always kept
    recent: int | None = None  # newest tokens, always kept; of snapkv the window whose queries score the others
    # snapkv, kvzip: whose kv heads compete for a common budget; head: each has its own.
    over: Literal["head", "layer", "model"] | None = None
    slack: int | None = None  # tokens a row grows past its budget before it is compacted
    pool: int | None = (
        None  # snapkv: neighbours over which attention is averaged; kvzip: which are worth next to as much
    )
    part: int | None = None  # kvzip: tokens of the prompt that are fed again at a time
    instruction: str | None = None  # kvzip: stands before each part

    def build(self) -> Policy:
        """Raises PassError for a policy that is none, and what it does not take; FormatError for a wrong value."""
        if self.policy not in POLICIES:
            raise PassError(f"evict_kv: no policy {self.policy!r}{did_you_mean(self.policy, POLICIES)}")
        kind = POLICIES[self.policy]
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("match", "policy")}
        given = {name: value for name, value in given.items() if value is not None}
        fields = {f.name: f for f in dataclasses.fields(kind)}
        wrong = [name for name in given if name not in fields]
        lacks = [name for name, f in fields.items() if name not in given and f.default is dataclasses.MISSING]
        if wrong or lacks:
            what = f"{wrong[0]} says nothing to it" if wrong else f"{lacks[0]} is missing"
            takes = ", ".join(name for name in fields if hasattr(self, name))
            raise PassError(f"evict_kv: policy {self.policy}: {what}; it takes {takes}")
        return kind(**given)


@register("evict_kv", axis=Axis.DROP, stage=Stage.CACHE, options=EvictKV, exact=False)
def evict_kv(site: Site, attn: Attention, opt: EvictKV) -> Attention | Skipped:
    """Rows keep `budget` cached tokens, or `ratio` of their prompt, and the pages behind them are free; which tokens stay, the
    policy says for every layer, and but for streaming_llm and tova for every kv head.

    streaming_llm (arXiv:2309.17453): the first and the newest, positions counted inside the cache; h2o (arXiv:2306.14048): those
    attended to most so far, and the newest; tova (arXiv:2401.06104): those that the newest token attends to; snapkv
    (arXiv:2404.14469): those of a prompt that its end attends to; kvzip (arXiv:2505.23416): those that the model needs to say its
    prompt again. Layers of one policy and budget share a page table, but where heads compete. Layers with a window stay as they
    are. What it costs shows over pages alone (`optx eval --paged`): a forward without caches throws nothing away.
    """
    if attn.cache.window is not None:
        return Skipped(f"has a window of {attn.cache.window}")
    if attn.cache.evict is not None:
        raise PassError(f"evict_kv at {site.path}: its cache throws tokens away already ({attn.cache.evict})")
    try:
        policy = opt.build()
        if policy.apart:  # heads keep different numbers, so that no two layers share a page table
            own = int(site.path.split("/")[1])
            policy = dataclasses.replace(policy, layer=own if attn.cache.share is None else attn.cache.share)
        return replace(attn, cache=attn.cache.replace(evict=policy, rotated=not policy.reindexed))
    except FormatError as error:
        raise PassError(f"evict_kv at {site.path}: {error}") from None
