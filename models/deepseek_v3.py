"""DeepSeek-V3: MLA with latents of queries and keys, sigmoid-routed experts in groups beside shared ones, an MTP module."""

import dataclasses
from collections.abc import Callable, Sequence

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.models.common import expert_rows, rope_from_hf, yarn_mscale
from optx.nn import MLA, MTP, Block, CausalLM, Embed, Experts, GatedMLP, Indexer, Linear, MoE, RMSNorm, Rope, Router

HF_TYPES = {"deepseek_v3": "DeepseekV3ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM"}  # model_type -> class
GGUF_ARCHITECTURE = None
# The MTP module's copies of the model's own embedding and head.
IGNORED: tuple[str, ...] = (r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",)

MIXER = {  # part of an MLA -> its name below self_attn
    "q": "q_proj", "q_a": "q_a_proj", "q_norm": "q_a_layernorm", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "o": "o_proj",
}  # fmt: skip
AROUND = {"embed_norm": "enorm", "hidden_norm": "hnorm", "join": "eh_proj", "norm": "shared_head.norm"}  # of an MTP
OF_TRAINING = ("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "output_router_logits", "router_aux_loss_coef")


def part_rows(path: str, hf: str) -> tuple[Row, ...]:
    """Rows of a part's weight, a vector where its name ends in norm, and of its bias."""
    kind = "vector" if path.endswith("norm") else "linear"
    return (
        Row(path=f"{path}/weight", hf=f"{hf}.weight", kind=kind),
        Row(path=f"{path}/bias", hf=f"{hf}.bias", kind="vector"),
    )


def block_rows(prefix: str = "model.layers.{i}.") -> tuple[Row, ...]:
    """Rows of a block of MLA and a gated MLP, or experts in its place."""
    path, mlp = "layers/{i}/", f"{prefix}mlp."
    rows = [*part_rows(f"{path}norm", f"{prefix}input_layernorm")]
    for ours, theirs in MIXER.items():
        rows += part_rows(f"{path}mixer/{ours}", f"{prefix}self_attn.{theirs}")
    rows += part_rows(f"{path}mlp_norm", f"{prefix}post_attention_layernorm")
    for ours, theirs in (("", ""), ("shared/", "shared_experts.")):
        for name in ("gate", "up", "down"):
            rows += part_rows(f"{path}mlp/{ours}{name}", f"{mlp}{theirs}{name}_proj")
    bias = Row(path=f"{path}mlp/router/selection_bias", hf=f"{mlp}gate.e_score_correction_bias", kind="vector")
    return (*rows, *expert_rows(mlp), bias)


def model_rows(block: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of a model of such blocks, and of an MTP module: files keep it as one layer more."""
    layer = "model.layers.{n}."

    def drafts(name):
        return tuple(map(drafts, name)) if isinstance(name, tuple) else name.replace("model.layers.{i}.", layer)

    draft = [dataclasses.replace(r, path=r.path.replace("layers/{i}/", "draft/block/"), hf=drafts(r.hf)) for r in block]
    for ours, theirs in AROUND.items():
        draft += part_rows(f"draft/{ours}", f"{layer}{theirs}")
    return (
        Row(path="embed/table", hf="model.embed_tokens.weight", kind="table"),
        *block,
        Row(path="norm/weight", hf="model.norm.weight", kind="vector"),
        Row(path="output/weight", hf="lm_head.weight"),
        *draft,
    )


ROWS = model_rows(block_rows())


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `deepseek_v3` config. Raises ConfigError for what is not handled."""
    mixer = mla(config, dtype, interleaved=config.take("rope_interleave", bool, True))
    dense = config.take("first_k_dense_replace", int, 3)
    return decoder(config, dtype, mixer, [i >= dense for i in range(config.layers())])


def mla(config: Fields, dtype: str, *, interleaved: bool, index: dict[str, int] | None = None) -> Callable[[], MLA]:
    """Builds the mixer of a block; index: sizes of its indexer, whose rope turns halves."""
    d, heads, q_rank = config.size("hidden_size"), config.size("num_attention_heads"), config.size("q_lora_rank", None)
    nope_dim, rope_dim = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    rank, value_dim = config.size("kv_lora_rank"), config.size("v_head_dim")
    bias = config.take("attention_bias", bool, False)
    rope = rope_from_hf(config, rope_dim)
    scale = _scale(config, nope_dim + rope_dim, rope)
    config.expect("num_key_value_heads", heads)
    config.expect("head_dim", rope_dim)
    config.expect("qk_head_dim", nope_dim + rope_dim)
    if index is not None:
        config.size("q_lora_rank")  # which the indexer's queries come from

    def build():
        indexer = None if index is None else Indexer(d, q_rank=q_rank, rope=rope, dtype=dtype, **index)
        turned = dataclasses.replace(rope, interleaved=interleaved)
        return MLA(
            d, heads=heads, rank=rank, nope_dim=nope_dim, value_dim=value_dim, rope=turned, q_rank=q_rank, scale=scale,
            bias=bias, indexer=indexer, dtype=dtype,
        )  # fmt: skip

    return build


def _scale(config: Fields, width: int, rope: Rope) -> float:
    """1 / sqrt(width), times the square of what `mscale_all_dim` sharpens attention by."""
    stretched = config.data.get("rope_parameters") or config.data.get("rope_scaling") or {}
    return width**-0.5 * yarn_mscale(rope.factor, stretched.get("mscale_all_dim") or 0.0) ** 2


def decoder(config: Fields, dtype: str, mixer: Callable[[], MLA], sparse: Sequence[bool]) -> CausalLM:
    """The model around `mixer`; sparse: which layers have experts."""
    d, vocab = config.size("hidden_size"), config.size("vocab_size")
    ffn, context = config.size("intermediate_size"), config.size("max_position_embeddings")
    eps = config.positive("rms_norm_eps", 1e-6)
    tied = config.take("tie_word_embeddings", bool, False)
    drafts = config.take("num_nextn_predict_layers", int, 0) or config.take("num_mtp_layers", int, 0)
    experts = _experts(config, d, dtype)
    config.expect("num_nextn_predict_layers", 0, 1)
    config.expect("num_mtp_layers", 0, 1)
    config.expect("moe_layer_freq", 1)
    config.expect("hidden_act", "silu")
    config.expect("mlp_bias", False)
    config.seen.update(OF_TRAINING)
    config.done()

    def norm():
        return RMSNorm(d, eps=eps, dtype=dtype)

    def block(routed):
        mlp = experts() if routed else GatedMLP(d, ffn, dtype=dtype)
        return Block(norm=norm(), mixer=mixer(), mlp_norm=norm(), mlp=mlp)

    return CausalLM(
        embed=Embed(vocab, d, dtype=dtype),
        layers=[block(routed) for routed in sparse],
        norm=norm(),
        head=None if tied else Linear(d, vocab, dtype=dtype, axes=("embed", "vocab")),
        context=context,
        draft=MTP(d, norm=norm, block=block(True), dtype=dtype) if drafts else None,
    )


def _experts(config: Fields, d: int, dtype: str) -> Callable[[], MoE]:
    count, ffn, top_k = (
        config.size("n_routed_experts"),
        config.size("moe_intermediate_size"),
        config.size("num_experts_per_tok"),
    )
    groups, kept, shared = (
        config.size("n_group", 1),
        config.size("topk_group", 1),
        config.take("n_shared_experts", int, 0),
    )
    scale, normalized = config.positive("routed_scaling_factor", 1.0), config.take("norm_topk_prob", bool, True)
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")

    def build():
        router = Router(
            d, count, top_k=top_k, score="sigmoid", normalized=normalized, scale=scale, selection_bias=True, groups=groups,
            kept=kept, dtype=dtype,
        )  # fmt: skip
        always = GatedMLP(d, ffn * shared, dtype=dtype) if shared else None
        return MoE(router, Experts(count, d, ffn, dtype=dtype), shared=always)

    return build
