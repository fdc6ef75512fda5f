"""Parts that models are wired from."""

from optx.nn.attention import Attention, FusedAttention
from optx.nn.core import Embed, Fused, FusedGatedMLP, GatedMLP, Linear, RMSNorm, Rope
from optx.nn.decoder import Block, CausalLM
from optx.nn.mla import MLA
from optx.nn.moe import Experts, Glu, GroupedLinear, MoE, Router
from optx.nn.ssm import Mamba2

__all__ = [
    "MLA",
    "Attention",
    "Block",
    "CausalLM",
    "Embed",
    "Experts",
    "Fused",
    "FusedAttention",
    "FusedGatedMLP",
    "GatedMLP",
    "Glu",
    "GroupedLinear",
    "Linear",
    "Mamba2",
    "MoE",
    "RMSNorm",
    "Rope",
    "Router",
]
