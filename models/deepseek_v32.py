"""DeepSeek-V3.2: DeepSeek-V3 whose attention takes the tokens that an indexer picks."""

from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Row
from optx.models.deepseek_v3 import IGNORED as IGNORED
from optx.models.deepseek_v3 import block_rows, decoder, mla, model_rows, part_rows
from optx.nn import CausalLM

HF_TYPES = {"deepseek_v32": "DeepseekV32ForCausalLM"}  # model_type -> transformers class
GGUF_ARCHITECTURE = None

_OURS, _THEIRS = "layers/{i}/mixer/indexer", "model.layers.{i}.self_attn.indexer."
INDEXER_ROWS = (
    *part_rows(f"{_OURS}/q", f"{_THEIRS}wq_b"),
    *part_rows(f"{_OURS}/k", f"{_THEIRS}wk"),
    *part_rows(f"{_OURS}/k_norm", f"{_THEIRS}k_norm"),
    Row(path=f"{_OURS}/weight", hf=f"{_THEIRS}weights_proj.weight"),
)
ROWS = model_rows((*block_rows(), *INDEXER_ROWS))


def from_hf(config: Fields, dtype: str) -> CausalLM:
    """Abstract model of a `deepseek_v32` config. Raises ConfigError for what is not handled."""
    index = {
        "heads": config.size("index_n_heads", 64),
        "head_dim": config.size("index_head_dim", 128),
        "top_k": config.size("index_topk", 2048),
    }
    mixer, layers = mla(config, dtype, interleaved=True, index=index), config.layers()
    dense = config.take("first_k_dense_replace", int, 3)
    kinds = config.names("mlp_layer_types", layers, ("dense", "sparse"))
    config.names("layer_types", layers, ("indexed_attention",))
    config.expect("rope_interleave", True)
    sparse = [i >= dense for i in range(layers)] if kinds is None else [kind == "sparse" for kind in kinds]
    return decoder(config, dtype, mixer, sparse)
