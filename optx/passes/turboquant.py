"""TurboQuant: keys and values rotated at random and stored by the codebook of a normal distribution."""

import dataclasses
from typing import Literal

from optx.formats import Codebook, CodebookQJL, Format, Int
from optx.hadamard import Rotation
from optx.nn.attention import Attention
from optx.nn.rotated import RotatedHeads
from optx.passes.rotated_kv import RotatedKV, check, rotated_kv
from optx.registry import Axis, Noted, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurboQuant(RotatedKV):
    bits: int = 4  # of keys, 1 to 4
    value_bits: int | None = None  # of values; None: as many as of keys
    values: Literal["codebook", "int"] = "codebook"  # int: with a zero point a token and head; 2 to 4 bits, or 8
    qjl: bool = False  # the last bit of a key's number is of a sketch of what the others leave; measured to lose
    seed: int = 0  # of the rotation's signs

    def formats(self, attn: Attention) -> dict[str, Format]:
        width = self.bits if self.value_bits is None else self.value_bits
        keys = (CodebookQJL if self.qjl else Codebook)(width=self.bits)
        return {
            "k": keys,
            "v": Codebook(width=width) if self.values == "codebook" else Int(width=width, symmetric=False),
        }


@register("turboquant", axis=Axis.BITS, stage=Stage.FOLD, options=TurboQuant, exact=False)
def turboquant(site: Site, attn: Attention, opt: TurboQuant) -> Attention | Noted | Skipped:
    """k' = codebook(k H) and q' = q H after their positions, v' = codebook(v H) and H^T o, H a Hadamard rotation of a head with
    random signs: a head's numbers are then close to normal, whatever channels stick out, and have one codebook.

    Zandieh et al. 2025, arXiv:2504.19874, with two changes that others measured to be needed (vLLM): lengths are exact and the
    QJL residual is off. b + 16 / H bits a number. H costs H log H operations of each head of q and k; that of values is
    folded into v and o. A rotation spreads outliers, it does not remove them: the bias of keys, where there is one, goes to
    split_key_bias first.
    """
    check(site, attn, "turboquant")
    rotation = Rotation(d=attn.head_dim, seed=opt.seed, mixed=True)
    rope = RotatedHeads(rope=attn.rope, rotation=rotation)
    return rotated_kv(site, attn, opt, rope, lambda w: rotation.fold(w, -1))
