"""A new pass, complete: weights stored in two bytes a number. Shown on a real model as Before, Expected and effect.

    python examples/write_a_pass.py                 # SmolLM2-135M-Instruct, fetched once (93 MB)
    python examples/write_a_pass.py MODEL           # anything that optx.load takes

The pass is `CastWeights` and `cast_weights`, nothing more. Moved to `optx/passes/cast_weights.py` and listed in
`optx/passes/__init__.py` it would ship with optx; here `@register` makes it known to the recipes of this process.
"""

import dataclasses
import sys
from typing import Literal

import optx
from fetch_models import FetchError, fetch
from optx import ir
from optx.nn import Linear
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register
from optx.tensor import is_qtensor, lift
from texts import ALICE


@dataclasses.dataclass(frozen=True, kw_only=True)
class CastWeights(PassOptions):
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


@register("cast_weights", axis=Axis.BITS, stage=Stage.WEIGHTS, options=CastWeights, exact=False)
def cast_weights(site: Site, linear: Linear, opt: CastWeights) -> Linear | Skipped:
    """w -> dtype(w), rounded to nearest even; sums stay in float32. bfloat16 keeps 8 bits of the mantissa, float16 11.

    The second parameter's type is the match: every Linear whose path fits the rule. The function constructs a new
    module and never writes into the old one. `lift` runs it on shapes for a plan and on arrays for a compile.
    """
    weight = linear.weight.get_value()
    if is_qtensor(weight):
        return Skipped("the weight is packed")
    return ir.replace(linear, weight=lift(lambda w: w.astype(opt.dtype), weight))


RECIPE = {"name": "cast", "weights": [{"pass": "cast_weights", "match": r"layers/.*"}]}
EXPECTED = """\
-layers/0-29/mixer/q: Linear f32[576, 576]
-layers/0-29/mixer/k: Linear f32[576, 192]
-layers/0-29/mixer/v: Linear f32[576, 192]
-layers/0-29/mixer/o: Linear f32[576, 576]
+layers/0-29/mixer/q: Linear bf16[576, 576]
+layers/0-29/mixer/k: Linear bf16[576, 192]
+layers/0-29/mixer/v: Linear bf16[576, 192]
+layers/0-29/mixer/o: Linear bf16[576, 576]
-layers/0-29/mlp/gate: Linear f32[576, 1536]
-layers/0-29/mlp/up: Linear f32[576, 1536]
-layers/0-29/mlp/down: Linear f32[1536, 576]
+layers/0-29/mlp/gate: Linear bf16[576, 1536]
+layers/0-29/mlp/up: Linear bf16[576, 1536]
+layers/0-29/mlp/down: Linear bf16[1536, 576]
"""  # of SmolLM2-135M: what a test of the pass compares with


def main(arguments: list[str]) -> None:
    optx.enable_compilation_cache()
    source = optx.load(arguments[0] if arguments else fetch("smollm2"))
    recipe = optx.Recipe.from_dict(RECIPE)

    print(f"Before, the first layer:\n\n{ir.describe(source.tree.layers[0])}")
    plan = optx.plan(source, recipe)  # on shapes: verified and counted before a weight is read
    changed = ir.diff(source.tree, plan.tree)
    assert arguments or changed == EXPECTED, f"expected\n{EXPECTED}got\n{changed}"
    print(f"What the pass changes{'' if arguments else ', as expected'}:\n\n{changed}")
    print(plan.text(context=1024))

    before, after = optx.compile(source), optx.compile(source, recipe)
    dense = before.evaluate(ALICE, context=512)
    cast = after.evaluate(ALICE, context=512, against=before)
    print(f"\nperplexity {dense.perplexity:.4f} -> {cast.perplexity:.4f}, KL {cast.kl:.1e} nats a token, ", end="")
    print(f"the likeliest token agrees in {100 * cast.top1:.1f} % of places")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (FetchError, optx.OptxError) as error:
        sys.exit(f"error: {error}")
