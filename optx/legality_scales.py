"""What is known to break where scales move between weights and where activations are rounded: rows as in legality_facts.py."""

from collections.abc import Sequence

from optx import ir
from optx.legality_facts import Finding, Intent, StepFact
from optx.passes.folding import Smoothing
from optx.passes.quantize_activations import QuantizeActivations
from optx.tensor import is_packed


def _values_read_elsewhere(intent: Intent) -> Sequence[Finding]:
    readers = [(path, mixer.cache) for path, mixer in intent.mixers().items() if mixer.cache.share is not None]
    taken = {path for path, _, options in intent.sites if options.values}
    return [Finding(path=path, got=str(spec)) for path, spec in readers if f"layers/{spec.share}" in taken]


def _nothing_packed(intent: Intent) -> Sequence[Finding]:
    weights = [(path, module.weight.get_value()) for path, module, _ in intent.sites]
    if any(is_packed(weight) for _, weight in weights):
        return []
    return [Finding(path=path, got=ir.tensor_text(weight)) for path, weight in weights]


SCALE_FACTS: tuple[StepFact, ...] = (
    StepFact(
        name="values_read_elsewhere",
        of=(Smoothing,),
        found=_values_read_elsewhere,
        why="the layer reads values of another, whose scale would move into that layer's own output projection only",
        fix="set values: false",
        source="arithmetic: (p (v / s)) W_o is not p v W_o",
        override=False,
    ),
    StepFact(
        name="activations_without_weights",
        of=(QuantizeActivations,),
        found=_nothing_packed,
        why="every weight that it would meet is dense, so the product would be as wide as before and less exact",
        fix="put quantize_weights or a calibrated pass of 8 bits before it",
        source="arithmetic: a product has the width of its wider operand",
        override=False,
    ),
)
