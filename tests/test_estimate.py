"""Static estimates of kernels that never ran: within the device's figures, and the ones that a plan for a B200 uses."""

import dataclasses

from optx import target
from optx.bench import estimate
from optx.target import TARGETS


def test_nothing_exceeds_the_device():
    found = estimate.estimates()
    assert len(found) == len(estimate.SHAPES)
    for call in found:
        assert 0 < call.of_bandwidth < 1 and 0 < call.of_peak < 1, call.name
        assert call.seconds > estimate.FILL


def test_what_binds():
    binds = {call.name: call.binds for call in estimate.estimates()}
    assert binds["int4_g128 16x4096x24576"] == "memory" and binds["int4_g128 4096x4096x24576"] == "shared memory"
    assert binds["bf16 4096x4096x24576"] == "products", "a pair of blocks fills shared memory with half the rows each"
    assert binds["bf16 4096x4096x24576, no pairs"] == "shared memory"
    assert binds["flash_attention causal 8192 x 32 x 64"] == "exponentials"
    assert (
        binds["decode of 32 over 8192 in bf16"] == "memory"
        and binds["decode of 32 over 8192 in int4"] == "shared memory"
    )
    assert binds["chunk of 2048 of 1 over 8192 in bf16"] == "products"


def test_fewer_bytes_take_less_time():
    b200 = TARGETS["b200"]
    seconds = [estimate.of_weight(stored, 16, 4096, 24576, b200).seconds for stored in (None, "int8", "int4_g128")]
    assert seconds[0] > 1.8 * seconds[1] > 3 * seconds[2] / 2
    slow = dataclasses.replace(b200, bandwidth=b200.bandwidth / 2)
    assert estimate.of_weight(None, 16, 4096, 24576, slow).seconds > 1.9 * seconds[0] - estimate.FILL


def test_targets_yaml_holds_the_estimates():
    stored = dict(TARGETS["b200"].decode.efficiency)
    assert all(share.compute is None for share in stored.values()), "the products hide behind the reads"
    held = {name: share.memory for name, share in stored.items() if not name.startswith("head/")}
    assert held == estimate.decode_shares(TARGETS["b200"])


def test_a_plan_says_that_they_are_estimates():
    assert TARGETS["b200"].source("decode").title.startswith("static estimate")
    assert "never ran" in TARGETS["b200"].source("decode").title
    assert target.key("matmul", "int4_g128") == "matmul/int4"


def test_text_has_published_figures_beside():
    text = estimate.text(estimate.estimates())
    assert "None was measured" in text and "1,605 TFLOP/s" in text and "6 TB/s" in text and "69% of 2,250" in text
