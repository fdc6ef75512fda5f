"""Parts that models are wired from."""

from optx.nn.attention import Attention, FusedAttention
from optx.nn.core import Embed, Fused, FusedGatedMLP, GatedMLP, Linear, RMSNorm, Rope
from optx.nn.decoder import Block, CausalLM
from optx.nn.mla import MLA
from optx.nn.ssm import Mamba2

__all__ = [
    "MLA",
    "Attention",
    "Block",
    "CausalLM",
    "Embed",
    "Fused",
    "FusedAttention",
    "FusedGatedMLP",
    "GatedMLP",
    "Linear",
    "Mamba2",
    "RMSNorm",
    "Rope",
]
