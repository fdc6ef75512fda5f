"""Published configs, built as shapes: parameters, those that a token meets, and cache bytes are the published ones."""

import time

import pytest

import optx
from optx import ir
from optx.configs import model_path

# name: (parameters, of which one token meets, cache bytes a token in bf16 (growing with the context), state bytes a row)
PUBLISHED = {
    "qwen3-8b": (8_190_735_360, 8_190_735_360, 147_456, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    start = time.perf_counter()
    tree = optx.load_config(model_path(name)).tree
    assert time.perf_counter() - start < 10
    specs = [spec for spec in tree.cache_plan().specs if spec is not None]
    tokens = sum(spec.unit_bytes for spec in specs if spec.holds_tokens)
    states = sum(spec.unit_bytes for spec in specs if not spec.holds_tokens)
    assert (ir.weight_count(tree), ir.active_count(tree), tokens, states) == PUBLISHED[name]
