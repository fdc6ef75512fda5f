"""StreamingLLM: the first tokens and the newest, positions counted inside the cache."""

import dataclasses
from typing import ClassVar

from optx.eviction.policy import Rolling


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Rolling):
    """Keeps `sinks` first tokens and the budget - sinks newest. Xiao et al. 2023, arXiv:2309.17453.

    Keys are stored before RoPE and rotated by their slot where they are read, queries by theirs (section 3.2): distances never
    exceed what the model was trained on, so the text may be of any length.
    """

    name: ClassVar[str] = "streaming_llm"
    by_query: ClassVar[bool] = False
    reindexed: ClassVar[bool] = True

    def worth(self, recorded, slots, length):
        return slots[None].astype("float32")
