"""`quant_matmul` on Hopper: the arrangement of weights, the kernel interpreted and lowered, what it refuses."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from optx import formats, tensor
from optx.bench.cases import quant_matmul as cases
from optx.bench.cases.registry import in_float32
from optx.bench.timing import relative_error
from optx.errors import LoweringError
from optx.pallas.late import overlapped
from optx.pallas.quant_matmul import mosaic_gpu_sm90 as kernel
from optx.pallas.quant_matmul import reference

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
SMALL = {case.name: case for case in cases.CASES if case.small}
FORMATS = ("int4", "int4_g32_asym", "int8", "int8_g64_asym", "fp8_e4m3", "fp8_e4m3_g64", "mxfp4", "nvfp4")


def weight(stored="int4_g64", d=128, f=192, seed=0):
    w = np.random.default_rng(seed).standard_normal((d, f))
    return tensor.quantize(jnp.asarray(w, jnp.bfloat16), formats.parse(stored))


def abstract(stored="int4_g128", d=4096, f=24576):
    return tensor.quantize(jax.ShapeDtypeStruct((d, f), jnp.bfloat16), formats.parse(stored))


def interpret(x, w, **tiles):
    w = kernel.relayout(w)
    chosen = dataclasses.replace(kernel.tiles_for(len(x), w), grid=2, stages=2, share=1, split=1, registers=False)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return np.asarray(kernel.quant_matmul(x, w, tiles=dataclasses.replace(chosen, **tiles)).astype(jnp.float32))


@pytest.mark.parametrize("stored", FORMATS)
def test_relayout_keeps_the_weight(stored):
    w = weight(stored)
    found = kernel.relayout(w).qtensor()
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(w), strict=True))
    assert (found.format, found.length, found.dtype) == (w.format, w.length, w.dtype)


def test_relayout_keeps_the_size():
    for stored in FORMATS:
        w = abstract(stored)
        found = jax.eval_shape(kernel.relayout, w)
        assert found.shape == w.shape
        assert found.nbytes <= w.nbytes * 1.06  # zero points take two bytes


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name):
    case = SMALL[name]
    args, _ = case.make(np.random.default_rng(0))
    assert relative_error(interpret(*args), reference.quant_matmul(*in_float32(args))) < case.tolerance


def test_interpreted_twice_is_equal_and_strips_do_not_matter():
    (x, w), _ = SMALL["int4_g32_asym_9x128x192"].make(np.random.default_rng(1))
    once = interpret(x, w, strips=1)
    assert np.array_equal(once, interpret(x, w, strips=1))
    assert np.array_equal(once, interpret(x, w, strips=2))


def test_warpgroups_that_share_a_strip():
    (x, w), _ = SMALL["int4_g128_5x256x128"].make(np.random.default_rng(2))
    assert (
        relative_error(interpret(x, w, strips=1, share=2, blocks=1), reference.quant_matmul(*in_float32((x, w)))) < 5e-3
    )


@pytest.mark.parametrize("rows", [5, 150])  # one item a block, and several
def test_weights_that_are_asked_for_ahead_of_activations(rows, monkeypatch):
    for name in (
        "griddepcontrol_wait",
        "griddepcontrol_launch_dependents",
    ):  # which the interpreter of jax 0.11.2 lacks
        monkeypatch.setattr(plgpu, name, lambda: None)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((rows, 512)), jnp.bfloat16)
    w = weight(d=512, f=320)
    found = overlapped(interpret)(x, w, stages=3)
    assert np.array_equal(found, interpret(x, w, stages=3))


def test_only_arranged_weights_are_asked_for_ahead(monkeypatch):
    """Others are arranged by the program itself."""
    w, found = weight(d=512, f=320), []
    monkeypatch.setattr(kernel, "_rows", lambda x, *w, plan: found.append(plan.ahead))

    def ahead(w):
        kernel.quant_matmul(jnp.ones((1, 512), jnp.bfloat16), w)
        return found.pop()

    assert not ahead(kernel.relayout(w))
    assert overlapped(ahead)(kernel.relayout(w)) and not overlapped(ahead)(w)


@pytest.mark.parametrize("stored", ["fp8_e4m3", "nvfp4"])
def test_nan_of_a_code_reaches_its_output(stored):
    w = weight(stored, f=64)
    if stored == "nvfp4":
        w = dataclasses.replace(w, scale=w.scale.at[3, 1].set(0x7F))
    else:
        w = dataclasses.replace(w, data=w.data.at[3, 5].set(jnp.nan))
    relaid = kernel.relayout(w)
    factors = relaid.scale if relaid.outer is None else relaid.outer
    assert np.flatnonzero(np.isnan(np.asarray(factors, np.float32)).ravel()).tolist() == [6]  # output 3: at 2 * 3


@pytest.mark.parametrize("rows", [1, 16, 64, 256, 4096])
@pytest.mark.parametrize("stored", FORMATS)
def test_tiles_fit_an_sm(rows, stored):
    for d, f in ((4096, 24576), (4096, 4096), (320, 320), (12288, 4096), (4096, 6144)):
        w = jax.eval_shape(kernel.relayout, abstract(stored, d, f))
        tiles = kernel.tiles_for(rows, w)
        plan = kernel.plan_for(w, tiles)
        assert kernel.shared(plan, w, tiles.stages) <= 227 << 10
        assert tiles.stages >= 2 * tiles.share
        assert d % (plan.step * tiles.split) == 0


@pytest.mark.parametrize(
    ("stored", "rows", "d", "f"),
    [
        ("int4_g128", 16, 4096, 24576),
        ("int4_g128", 16, 4096, 4096),
        ("int8_asym", 64, 1024, 448),
        ("nvfp4", 4096, 4096, 1024),
    ],
)
def test_lowers_for_hopper(stored, rows, d, f):
    x = jax.ShapeDtypeStruct((rows, d), jnp.bfloat16)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    lowered = jax.export.export(jax.jit(kernel.quant_matmul), platforms=["cuda"], disabled_checks=checks)
    assert lowered(x, abstract(stored, d, f)).out_avals[0].shape == (rows, f)


def test_supports():
    asked = lambda w, **more: kernel.supports({"weight": w, **more}, HOPPER)  # noqa: E731
    assert asked(abstract()) is None
    assert asked(jax.eval_shape(kernel.relayout, abstract())) is None
    assert asked(abstract("int3")) == "w is int3; allowed: int4, int8, fp8_e4m3, mxfp4, nvfp4"
    assert asked(abstract("fp8_e5m2")).startswith("w is fp8_e5m2")
    assert "multiples of 64" in asked(abstract("int8", 96, 64))
    assert "groups of 8" in asked(abstract("int8_g8"))
    assert "packed along axis -1" in asked(abstract().T)
    assert asked(abstract(), activations=formats.parse("int8")) == "activations in int8; allowed: as they are"
    assert asked(abstract(), dtype=jnp.float32) == "x is float32; allowed: bfloat16"
    assert "not tpu" in kernel.supports({"weight": abstract()}, types.SimpleNamespace(platform="tpu", arch="v6e"))


def test_refuses():
    x = jnp.zeros((2, 128), jnp.bfloat16)
    with pytest.raises(LoweringError, match="x is float32; allowed: bfloat16"):
        kernel.quant_matmul(x.astype(jnp.float32), weight())
    with pytest.raises(LoweringError, match=r"x \[2, 64\] meets w \[128, 192\]; allowed: x \[..., 128\]"):
        kernel.quant_matmul(x[:, :64], weight())
    with pytest.raises(LoweringError, match="w is int2"):
        kernel.quant_matmul(x, weight("int2"))
    assert kernel.quant_matmul(x[:0], weight()).shape == (0, 192)
