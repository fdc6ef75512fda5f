"""`grouped_matmul`: the reference against a plain loop, the Hopper kernels interpreted and lowered, what they refuse."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from optx import formats, tensor
from optx.bench.cases import grouped_matmul as cases
from optx.bench.cases.registry import in_float32
from optx.bench.timing import relative_error
from optx.errors import LoweringError, OptxError
from optx.pallas.grouped_matmul import mosaic_gpu_sm90 as kernel
from optx.pallas.grouped_matmul import packed_sm90, reference

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
SMALL = {case.name: case for case in cases.CASES if case.small}
LOWERED = ("prefill", "one_token", "decode_int4_g64_asym")


def interpretable(x, w, **more):
    """Tiles of the call, few blocks, without what the interpreter cannot run."""
    plain = {"registers": False} if kernel.packed(w) else {"alias": False}
    return dataclasses.replace(kernel.tiles_of(x, w), grid=2, stages=3, **plain, **more)


def interpret(x, w, sizes, **more):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return np.asarray(kernel.grouped_matmul(x, w, sizes, tiles=interpretable(x, w, **more)).astype(jnp.float32))


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name):
    case = SMALL[name]
    args, _ = case.make(np.random.default_rng(0))
    found = interpret(*args)
    assert relative_error(found, reference.grouped_matmul(*in_float32(args))) < case.tolerance
    assert not found[int(args[2].sum()) :].any()


def test_interpreted_twice_is_equal():
    args, _ = SMALL["small_int4"].make(np.random.default_rng(1))
    w = kernel.relayout(args[1])
    assert np.array_equal(interpret(args[0], w, args[2]), interpret(args[0], args[1], args[2]))


@pytest.mark.parametrize("name", ["small"])
def test_more_rows_listed_than_there_are(name):
    (x, w, _), _ = SMALL[name].make(np.random.default_rng(0))
    x = jnp.nan_to_num(x[:24])
    sizes = jnp.full(w.shape[0], 18, jnp.int32)
    want = reference.grouped_matmul(*in_float32((x, w, sizes)))
    assert relative_error(interpret(x, w, sizes), want) < 5e-3


@pytest.mark.parametrize("strips", packed_sm90.REGISTERS)
def test_registers_fit_into_those_of_the_launch(strips):
    threads = 128 * (strips + 1)
    at_launch = 65536 // threads // 8 * 8 * threads
    computes, loads = packed_sm90.REGISTERS[strips]
    assert 128 * (strips * computes + loads) <= at_launch


def plain(x, w, sizes):
    """The definition, one row at a time."""
    x, w = np.asarray(x, np.float32), np.asarray(tensor.dense(w), np.float32)
    out, row = np.zeros((len(x), w.shape[2]), np.float32), 0
    for expert, size in enumerate(np.asarray(sizes)):
        out[row : row + size] = x[row : row + size] @ w[expert]
        row += size
    return out


@pytest.mark.parametrize("name", [*SMALL, "one_token", "no_rows"])
def test_reference(name):
    args, _ = next(case for case in cases.CASES if case.name == name).make(np.random.default_rng(0))
    args = in_float32(args)
    assert relative_error(reference.grouped_matmul(*args), plain(*args)) < 1e-5


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    case = next(case for case in cases.CASES if case.name == name)
    args = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), case.make(np.random.default_rng(0))[0]
    )
    if kernel.packed(args[1]):
        args = (args[0], jax.eval_shape(kernel.relayout, args[1]), args[2])
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(lambda x, w, sizes: kernel.grouped_matmul(x, w, sizes))
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=unchecked)(*args)
    assert exported.out_avals[0].shape == (args[0].shape[0], args[1].shape[2])


@pytest.mark.parametrize("text", ["int8", "int8_g64_asym", "int4", "int4_g32_asym", "fp8_e4m3"])
def test_relayout_and_back(text):
    w = tensor.quantize(jax.random.normal(jax.random.key(0), (3, 128, 192), jnp.bfloat16), formats.parse(text))
    arranged = kernel.relayout(w)
    assert arranged.shape == w.shape
    assert arranged.nbytes == w.nbytes + (0 if w.zero is None else w.zero.size)  # zero points grow to bfloat16
    back = arranged.qtensor()
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, back, w))
    assert np.array_equal(tensor.dense(arranged), w.dequantize())


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_supports_its_cases(case):
    assert kernel.supports(case.site, HOPPER) is None


@pytest.mark.parametrize(
    "site, reason",
    [
        (cases.site(4, 100, 128), "D 100"),
        (cases.site(4, 128, 96), "F 96"),
        (cases.site(4, 128, 128, dtype="float32"), "float32"),
        (cases.site(4, 128, 128) | {"dtype": "float16"}, "one type"),
        (cases.site(4, 128, 128, format="int3"), "int3"),
        (cases.site(4, 128, 128, format="fp8_e5m2"), "e5m2"),
        (cases.site(4, 128, 128, format="int4_g16"), "groups: 32"),
        (cases.site(4, 128, 128, format="int8") | {"dtype": "float16"}, "packed"),
    ],
)
def test_declines(site, reason):
    assert reason in kernel.supports(site, HOPPER)


def test_declines_other_chips():
    for platform, arch in (("gpu", "sm100"), ("cpu", None), ("tpu", "v6e")):
        assert "sm90" in kernel.supports(cases.site(4, 128, 128), types.SimpleNamespace(platform=platform, arch=arch))


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"x": jnp.zeros((3, 64, 1), jnp.bfloat16)}, OptxError, "x bfloat16"),
        ({"x": jnp.zeros((3, 64), jnp.bfloat16)}, OptxError, "w"),
        ({"group_sizes": jnp.zeros(5, jnp.int32)}, OptxError, "group_sizes"),
        ({"group_sizes": jnp.zeros(3)}, OptxError, "group_sizes float32"),
        ({"x": jnp.zeros((3, 128))}, LoweringError, "x of float32"),
        ({"tiles": "packed"}, LoweringError, "tiles"),
    ],
)
def test_refuses(change, error, said):
    given = {"x": jnp.zeros((3, 128), jnp.bfloat16), "w": jnp.zeros((3, 128, 64), jnp.bfloat16)}
    given |= {"group_sizes": jnp.zeros(3, jnp.int32), **change}
    with pytest.raises(error, match=f"grouped_matmul.*{said}"):
        kernel.grouped_matmul(given.pop("x"), given.pop("w"), given.pop("group_sizes"), **given)


def test_gradients():
    """Of tokens and of a dense weight, against a matrix picked for each token; rows past the groups' have none."""
    rng = np.random.default_rng(0)
    x, w, slope = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((13, 5), (4, 5, 3), (13, 3)))
    sizes, owner = jnp.asarray([3, 0, 6, 2]), np.repeat(np.arange(5), [3, 0, 6, 2, 2])

    def picked(x, w):
        whole = jnp.concatenate([w, jnp.zeros((1, 5, 3))])
        return jnp.sum(jnp.einsum("td,tdf->tf", x, whole[owner]) * slope)

    def grouped(x, w):
        return jnp.sum(reference.grouped_matmul(x, w, sizes) * slope)

    for found, want in zip(jax.jit(jax.grad(grouped, (0, 1)))(x, w), jax.grad(picked, (0, 1))(x, w)):
        assert relative_error(found, want) < 1e-5
    assert not np.any(np.asarray(jax.grad(grouped)(x, w))[11:])
