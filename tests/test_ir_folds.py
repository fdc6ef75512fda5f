"""How lists of layers are printed: equal ones once, patterns by their period, numbers by layer as a range."""

import pytest

from optx import ir
from optx.nn import Block, CausalLM, Embed, GatedMLP, LinearAttention, RMSNorm

D = 8


def model(rates, ffn=lambda i: 16) -> CausalLM:
    def block(i, rate):
        mixer = None if rate is None else LinearAttention(D, heads=2, head_dim=4, rate=rate)
        norm = None if rate is None else RMSNorm(D)
        return Block(norm=norm, mixer=mixer, mlp_norm=RMSNorm(D), mlp=GatedMLP(D, ffn(i)))

    layers = [block(i, rate) for i, rate in enumerate(rates)]
    return CausalLM(embed=Embed(16, D), layers=layers, norm=RMSNorm(D), head=None, context=8)


def blocks(tree) -> list[str]:
    return [entry.path for entry in ir.entries(tree) if entry.text.startswith("Block")]


@pytest.mark.parametrize(
    "indices, total, text",
    [
        ([0, 1, 2, 5], 6, "0-2,5"),
        ([0, 2, 4, 6], 8, "0,2,4,6"),  # few runs are listed
        ([0, 2, 4, 6, 8], 10, "0 of every 2 to 9"),
        ([i for i in range(80) if i % 8 != 7], 80, "0-6 of every 8 to 79"),
        ([i for i in range(32) if i % 2 == 0 and i % 8 != 4], 32, "0,2,6 of every 8 to 31"),
        ([i for i in range(62) if i % 6 != 5], 62, "0-4 of every 6 to 61"),  # the last period is short
        ([0, 2, 4, 6, 8], 11, "0,2,4,6,8"),  # does not go on to the end
        ([1, 3, 5, 7, 8], 10, "1,3,5,7-8"),
    ],
)
def test_ranges(indices, total, text):
    assert ir._ranges(indices, total) == text


def test_patterns_are_printed_once():
    tree = model([None if i % 4 == 3 else 1.0 for i in range(24)], lambda i: 16 + 8 * (i % 2))
    want = ["0 of every 2 to 23", "1 of every 4 to 23", "3 of every 4 to 23"]
    assert blocks(tree) == [f"layers/{text}" for text in want]
    assert sum(entry.bytes for entry in ir.entries(tree)) == ir.weight_bytes(tree)


def test_numbers_by_layer_are_a_range_where_they_lie_on_a_line():
    tree = model([1 - i / 4 for i in range(4)])
    assert blocks(tree) == ["layers/0-3"]
    (mixer,) = (entry for entry in ir.entries(tree) if entry.text.startswith("LinearAttention"))
    assert "rate=1..0.25 " in mixer.text and mixer.path == "layers/0-3/mixer"
    assert sum(entry.bytes for entry in ir.entries(tree)) == ir.weight_bytes(tree)
    assert blocks(model([1.0, 1.0, 0.5, 0.25])) == ["layers/0-1", "layers/2", "layers/3"], "a range would not say all"
    assert "rate=1 " in ir.describe(model([1.0, 1.0]))


def test_a_change_of_a_number_by_layer_is_seen():
    tree = model([1 - i / 4 for i in range(4)])
    other = ir.shallow(tree)
    ir.put(other, "layers/1/mixer", ir.replace(other.layers[1].mixer, rate=0.7))
    text = ir.diff(tree, other)
    assert "+layers/1/mixer: LinearAttention heads=2 head_dim=4 rate=0.7 " in text
