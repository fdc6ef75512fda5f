"""What is known to break where the heads of attention are rotated and key biases split off: rows as in legality_facts.py."""

from optx.legality_facts import Finding, Intent, StepFact
from optx.nn.attention import Attention
from optx.passes.rotate_online import RotateOnline
from optx.passes.rotated_kv import RotatedKV
from optx.passes.split_key_bias import SplitKeyBias
from optx.passes.turboquant import TurboQuant


def _keys_rotated_apart(intent: Intent) -> list[Finding]:
    after = {path: mixer for path, mixer in intent.applied().items() if isinstance(mixer, Attention)}
    turned = {path: mixer.rope and mixer.rope.rotation for path, mixer in after.items()}
    readers = ((path, f"layers/{m.cache.share}/mixer") for path, m in after.items() if m.cache.share is not None)
    differ = [(path, owner) for path, owner in readers if turned[path] != turned[owner]]
    return [Finding(path=path, got=f"{turned[path]}, over keys of {turned[owner]}") for path, owner in differ]


def _heads_rotated_twice(intent: Intent) -> list[Finding]:
    turned = {p: m.rope.rotation for p, m, _ in intent.sites if isinstance(m, Attention) and m.rope is not None}
    wanted = {path for path, _, options in intent.sites if getattr(options, "keys", True)}
    return [Finding(path=path, got=str(way)) for path, way in turned.items() if way is not None and path in wanted]


def _codebook_of_gated_values(intent: Intent) -> list[Finding]:
    gated = [(path, attn.gate) for path, attn, o in intent.sites if attn.gate is not None and o.values == "codebook"]
    return [Finding(path=path, got=f"values: codebook, under a {gate} gate") for path, gate in gated]


def _split_keys_read_by_others(intent: Intent) -> list[Finding]:
    after = intent.applied()
    readers = ((path, mixer.cache) for path, mixer in after.items() if mixer.cache.share is not None)
    owners = ((path, spec, after[f"layers/{spec.share}/mixer"]) for path, spec in readers)
    return [Finding(path=path, got=str(spec)) for path, spec, owner in owners if owner.key_bias is not None]


HEAD_FACTS: tuple[StepFact, ...] = (
    StepFact(
        name="keys_rotated_twice",
        of=(RotateOnline, RotatedKV),
        found=_heads_rotated_twice,
        why="queries and keys are rotated after their positions already, and a second rotation costs time for nothing",
        fix="keep one of the passes that rotate keys, or set keys: false in rotate_online",
        source="arithmetic: the product of two rotations is one rotation",
        override=False,
    ),
    StepFact(
        name="keys_rotated_apart",
        of=(RotateOnline, RotatedKV),
        found=_keys_rotated_apart,
        why="the layer reads keys that another wrote, and both sides of q . k need one rotation",
        fix="give the pass one rule for both layers; oscar, which calibrates each layer by itself, takes none",
        source="arithmetic: q H . k is not q . k",
        override=False,
    ),
    StepFact(
        name="codebook_of_gated_values",
        of=(TurboQuant,),
        found=_codebook_of_gated_values,
        why="a gate multiplies each number of a head before o, so values are not rotated, which the codebook wants",
        fix="set values: int",
        source="arithmetic: (v R * g) R^T is not v * g; TurboQuant, arXiv:2504.19874, section 3.1",
    ),
    StepFact(
        name="split_keys_read_by_others",
        of=(SplitKeyBias,),
        found=_split_keys_read_by_others,
        why="the layer reads keys that another wrote without their bias, and does not know it",
        fix="keep the layer whose cache is read out of the pass with 'match'",
        source="arithmetic: q . k is not q . (k + b)",
        override=False,
    ),
)
