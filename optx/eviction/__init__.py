"""Which cached tokens a row keeps: policies of eviction, by name."""

from optx.eviction.h2o import H2O
from optx.eviction.kvzip import KVzip
from optx.eviction.policy import Policy
from optx.eviction.snapkv import SnapKV
from optx.eviction.streaming_llm import StreamingLLM
from optx.eviction.tova import TOVA

POLICIES: dict[str, type[Policy]] = {kind.name: kind for kind in (StreamingLLM, H2O, TOVA, SnapKV, KVzip)}
