"""optx: a compiler for LLM inference in JAX.

A checkpoint becomes a Flax (nnx) module tree, a recipe says which optimizations to apply, passes rewrite the tree, lowering
picks a kernel for every op, an engine decodes.
"""

from optx.api import Compiled, Plan, compile, export, load, load_config, plan
from optx.compaction import Compaction
from optx.compilation_cache import enable_compilation_cache
from optx.conversation import Conversation
from optx.engine.request import Sampling
from optx.engine.speculation import Speculation
from optx.errors import OptxError
from optx.grammar import Grammar
from optx.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "Compaction",
    "Compiled",
    "Conversation",
    "Grammar",
    "OptxError",
    "Plan",
    "Recipe",
    "Sampling",
    "Speculation",
    "compile",
    "enable_compilation_cache",
    "export",
    "load",
    "load_config",
    "plan",
]
