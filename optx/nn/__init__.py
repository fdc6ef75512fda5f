"""Parts that models are wired from."""

from optx.nn.attention import Attention, FusedAttention
from optx.nn.core import MLP, Embed, Fused, FusedGatedMLP, GatedMLP, JoinedGatedMLP, LayerNorm, Linear, RMSNorm, Rope
from optx.nn.decoder import Block, CausalLM, Residual
from optx.nn.delta import GatedDelta
from optx.nn.indexer import Indexer
from optx.nn.linear_attention import LinearAttention
from optx.nn.mamba1 import Mamba1
from optx.nn.mla import MLA
from optx.nn.moe import Experts, Glu, GroupedLinear, LatentExperts, MoE, Router
from optx.nn.mtp import MTP
from optx.nn.ssm import Mamba2

__all__ = [
    "MLA",
    "MLP",
    "MTP",
    "Attention",
    "Block",
    "CausalLM",
    "Embed",
    "Experts",
    "Fused",
    "FusedAttention",
    "FusedGatedMLP",
    "GatedDelta",
    "GatedMLP",
    "Glu",
    "GroupedLinear",
    "Indexer",
    "JoinedGatedMLP",
    "LayerNorm",
    "LatentExperts",
    "Linear",
    "LinearAttention",
    "Mamba1",
    "Mamba2",
    "MoE",
    "RMSNorm",
    "Residual",
    "Rope",
    "Router",
]
