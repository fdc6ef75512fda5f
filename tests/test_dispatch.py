"""The dispatch table: which row takes a call and why the others decline; what every op asks of its arguments."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import ir
from optx.bench.cases import registry
from optx.cache import Layout, Ragged, View
from optx.errors import LoweringError
from optx.nn.attention import Attention
from optx.nn.core import Rope
from optx.nn.mla import MLA
from optx.pallas import dispatch
from optx.pallas.attention import checks
from optx.pallas.dispatch import OpSite
from optx.target import TARGETS

OPS = sorted({row.op for row in dispatch.ROWS})
KERNELS = [row for row in dispatch.ROWS if row.backend != "xla"]


@pytest.mark.parametrize("row", dispatch.ROWS, ids=lambda row: f"{row.op}-{row.name}")
def test_every_row_holds_its_function(row):
    assert callable(row.run)
    assert [r for r in dispatch.rows(row.op) if r.name == row.name] == [row], "names tell rows of an op apart"


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: f"{row.op}-{row.name}")
def test_a_kernel_declines_other_devices(row):
    for name in ("cpu", "b200", "tpu-v5e", "h100"):
        target = TARGETS[name]
        if target.platform != dispatch.PLATFORMS[row.backend] or row.arch not in ("any", target.arch):
            assert row.supports({}, target).startswith("is for ")


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: f"{row.op}-{row.name}")
def test_a_kernel_has_cases_and_benchmark_shapes(row):
    platform = dispatch.PLATFORMS[row.backend]
    targets = [t for t in TARGETS.values() if t.platform == platform and row.arch in ("any", t.arch)]
    for what in (registry.cases, registry.shapes):
        assert any(row in registry.kernels(item, target) for item in what([row.op]) for target in targets)


def part(**changes):
    rope = Rope(theta=1e4, dim=128)
    kwargs = {"heads": 32, "kv_heads": 8, "head_dim": 128, "rope": rope, "dtype": "bfloat16"} | changes
    return Attention(4096, **kwargs)


def chosen(module, target="h100", require=None):
    choices = [dispatch.select(site, TARGETS[target], require) for site in module.op_sites()]
    return {choice.op: str(choice) for choice in choices}


def test_attention_on_each_target():
    ops = ("flash_attention", "rotate_append", "ragged_paged_attention", "paged_decode")
    assert chosen(part(), require="mosaic_gpu") == dict.fromkeys(ops, "mosaic_gpu/sm90")
    new = {row.op for row in KERNELS if not row.verified and not row.variant}
    assert chosen(part()) == {op: "xla" if op in new else "mosaic_gpu/sm90" for op in ops}
    assert chosen(part(), "h200") == chosen(part())
    assert chosen(part(), "cpu") == dict.fromkeys(ops, "xla")
    assert chosen(part(), "b200") == dict.fromkeys(ops, "mosaic_gpu/sm100") | {"rotate_append": "xla"}
    assert chosen(part(), "b200", "xla") == dict.fromkeys(ops, "xla")
    assert chosen(part(), "tpu-v6e") == dict.fromkeys(ops, "mosaic_tpu") | {"rotate_append": "xla"}


def test_what_no_kernel_takes_goes_to_the_reference_with_reasons():
    (flash, *_) = part(head_dim=80, rope=Rope(theta=1e4, dim=80)).op_sites()
    choice = dispatch.select(flash, TARGETS["h100"])
    assert str(choice) == "xla" and "80" in dict(choice.declined)["mosaic_gpu/sm90"]
    with pytest.raises(LoweringError, match="flash_attention: no kernel takes this call.*80.*the reference"):
        dispatch.select(flash, TARGETS["h100"], require="mosaic_gpu")


def test_a_row_that_is_not_verified_has_to_be_asked_for(monkeypatch):
    rows = [dataclasses.replace(row, verified=row.backend == "xla") for row in dispatch.ROWS]
    monkeypatch.setattr(dispatch, "ROWS", tuple(rows))
    site = next(site for site in part().op_sites() if site.op == "ragged_paged_attention")
    choice = dispatch.select(site, TARGETS["h100"])
    assert str(choice) == "xla" and "not verified on the device yet" in dict(choice.declined)["mosaic_gpu/sm90"]
    assert str(dispatch.select(site, TARGETS["h100"], require="mosaic_gpu")) == "mosaic_gpu/sm90"


def test_a_row_for_large_weights_leaves_small_ones_unless_it_is_asked_for():
    sites = {case.name: dispatch.OpSite(op="norm_matmul", args=case.site) for case in registry.cases(("norm_matmul",))}
    large, small = sites["int4_g128_1x4096x24576"], sites["int4_g128_1x4096x6144"]
    assert str(dispatch.select(large, TARGETS["h100"])) == "mosaic_gpu/sm90"
    choice = dispatch.select(small, TARGETS["h100"])
    assert str(choice) == "xla" and "no faster below 16,777,216" in dict(choice.declined)["mosaic_gpu/sm90"]
    assert str(dispatch.select(small, TARGETS["h100"], require="mosaic_gpu")) == "mosaic_gpu/sm90"


def test_batch_invariant_attention_has_rows_of_its_own():
    for site in part().op_sites():
        choice = dispatch.select(site, TARGETS["h100"], invariant=True)
        assert dispatch.row_of(choice).order != "batch"
        if site.op in ("paged_decode", "ragged_paged_attention"):
            whole = next(row for row in dispatch.rows(site.op) if row.variant == "whole")
            assert str(choice) == (whole.name if whole.verified else "xla")
            assert dict(choice.declined)["mosaic_gpu/sm90"] == "its sums depend on the batch"
            usual = dispatch.select(site, TARGETS["h100"])
            assert dict(usual.declined)["mosaic_gpu/sm90/whole"] == "is for batch_invariant: slower"


def test_latents_have_kernels_of_their_own():
    rope = Rope(theta=1e4, dim=64)
    mla = MLA(7168, heads=128, rank=512, nope_dim=128, value_dim=128, rope=rope, dtype="bfloat16")
    took = chosen(mla)
    assert took["paged_decode"] == took["ragged_paged_attention"] == "mosaic_gpu/sm90/latent"
    assert took["flash_attention"] == "mosaic_gpu/sm90", "expanded: keys of 192, values of 128"


def test_an_op_without_the_required_backend_keeps_its_own():
    site = OpSite(op="ssm_scan", args={})
    assert str(dispatch.select(site, TARGETS["h100"], require="mosaic_gpu")) == "xla"


def test_an_unknown_op():
    with pytest.raises(LoweringError, match="'paged_decod' is not in the table; did you mean 'paged_decode'"):
        dispatch.rows("paged_decod")


def test_decoding_and_chunks_are_ops_apart(monkeypatch):
    called = []
    real = dispatch.call

    def call(op, *args, **kw):
        called.extend([op] * (op != "matmul"))
        return real(op, *args, **kw)

    monkeypatch.setattr(dispatch, "call", call)
    attn = ir.init_weights(part(heads=4, kv_heads=2, head_dim=8, rope=None, dtype="float32"))
    for length, op in ((1, "paged_decode"), (8, "paged_decode"), (9, "ragged_paged_attention")):
        _over_cache(attn, length)
        assert called[-1] == op


def _over_cache(attn, length):
    layout = Layout(pages=2, page_size=16, slots=1)
    view = View(
        pool=attn.cache.init(layout),
        slots=jnp.zeros(1, jnp.int32),
        positions=jnp.zeros((3, 16), jnp.int32),
        table=jnp.zeros((1, 1, 2), jnp.int32),
        lengths=jnp.full((1, 1), length, jnp.int32),
        writes=jnp.arange(length, dtype=jnp.int32),
    )
    return attn(jnp.ones((length, 4096)), Ragged.dense(1, length), view)


def call(**changes):
    """A small paged_decode through the table."""
    args = {
        "q": np.zeros((2, 1, 4, 8), np.float32),
        "k_pool": np.zeros((5, 2, 16, 8), np.float32),
        "v_pool": np.zeros((5, 2, 16, 8), np.float32),
        "q_positions": np.full((2, 1), 3, np.int32),
        "positions": np.zeros((5, 16), np.int32),
        "table": np.array([[[0, 1], [2, 3]]], np.int32),
        "lengths": np.full((1, 2), 20, np.int32),
    } | changes
    args = {key: jnp.asarray(value) if isinstance(value, np.ndarray) else value for key, value in args.items()}
    q, k_pool, v_pool = (args.pop(key) for key in ("q", "k_pool", "v_pool"))
    return dispatch.call("paged_decode", (), q, k_pool, v_pool, **args)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": np.zeros((2, 4, 8), np.float32)}, "paged_decode: q is float32[2, 4, 8]; allowed: floating [B, Q, N, H]"),
        ({"q": np.zeros((2, 1, 3, 8), np.float32)}, "k_pool is float32[5, 2, 16, 8]; allowed: kv heads that divide 3"),
        ({"k_pool": np.zeros((5, 2, 16, 4), np.float32)}, "allowed: [pages, K, P, 8]"),
        ({"v_pool": np.zeros((4, 2, 16, 8), np.float32)}, "v_pool is float32[4, 2, 16, 8]"),
        ({"v_pool": None}, "value_dim is None; allowed: 1 to 8 without v_pool"),
        ({"positions": np.zeros((4, 16), np.int32)}, "positions is int32[4, 16]; allowed: int32[5, 16]"),
        ({"table": np.zeros((3, 2, 2), np.int32)}, "table is int32[3, 2, 2]; allowed: int32[G, 2, pages], G = 1 or 2"),
        ({"lengths": np.zeros((1, 3), np.int32)}, "lengths is int32[1, 3]; allowed: int32[1, 2]"),
        ({"q_positions": np.zeros((2, 2), np.int32)}, "q_positions is int32[2, 2]; allowed: int32[2, 1]"),
        ({"sink_logits": np.zeros(3, np.float32)}, "sink_logits is float32[3]; allowed: [4]"),
        (
            {"logit_scale": np.ones((5, 1, 16), np.float32)},
            "logit_scale is float32[5, 1, 16]; allowed: [5, a multiple of 2 that divides 4, 16]",
        ),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    with pytest.raises(LoweringError, match=re.escape(message)):
        call(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"table": np.array([[[0, 1], [2, 9]]], np.int32)}, "the table lists pages 0 to 9; allowed: 0 to 4"),
        ({"table": np.array([[[0, -1], [2, 3]]], np.int32)}, "the table lists pages -1 to 3; allowed: 0 to 4"),
        ({"lengths": np.array([[20, 33]], np.int32)}, "lengths are 20 to 33; allowed: 0 to 32"),
    ],
)
def test_page_tables_are_checked_in_debug_mode(changes, message):
    error, _ = checks.checkified(lambda: call(**changes))()
    assert message in error.get()
    unread = {"table": np.array([[[0, 99], [2, 3]]], np.int32), "lengths": np.array([[16, 20]], np.int32)}
    assert checks.checkified(lambda: call(**unread))()[0].get() is None, "what is not read may be anything"
    assert not jax.make_jaxpr(lambda: call(**unread))().effects, "an effect would slow down every call of the program"
    jax.jit(lambda: call(**unread))()
