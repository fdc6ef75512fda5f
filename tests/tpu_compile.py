"""Compiles the TPU rows with libtpu on a machine without a TPU, one JSON line a compile.

    python tests/tpu_compile.py v5e v6e v7x [-k text]

A process of its own, because libtpu reads the environment when it is loaded. Nothing is executed: that a kernel compiles
says that Mosaic takes it, that it fits VMEM and how its operands lie, nothing of its speed or of its numbers.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding  # noqa: E402

from optx import formats, tensor  # noqa: E402
from optx.cache import Ragged  # noqa: E402
from optx.pallas.attention.reference import Mask  # noqa: E402
from optx.pallas.flash_attention import mosaic_tpu as flash  # noqa: E402
from optx.pallas.grouped_matmul import mosaic_tpu as grouped  # noqa: E402
from optx.pallas.paged_decode import mosaic_tpu as paged_decode  # noqa: E402
from optx.pallas.quant_matmul import mosaic_tpu as quant  # noqa: E402
from optx.pallas.ragged_paged_attention import mosaic_tpu as ragged_attention  # noqa: E402

CHIPS = {"v5e": ("v5e:2x2", "TPU v5 lite"), "v6e": ("v6e:2x2", "TPU v6 lite"), "v7x": ("tpu7x:2x2x1", "TPU7x")}
bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
array = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Compile:
    """One compile: a function of arrays, their shapes, and the array that the program must not copy."""

    function: object
    args: tuple
    kept: object = None  # a large operand: a copy or transpose of as many elements is an error


def pool(pages, kv_heads, page, head_dim, format_=None, dtype=bf16):
    dense = array((pages + 1, kv_heads, page, head_dim), dtype)
    if format_ is None:
        return dense
    return jax.eval_shape(lambda x: tensor.quantize(x, formats.parse(format_), axis=-1), dense)


def paged(
    batch=8, queries=1, heads=32, kv_heads=8, head_dim=128, page=128, format_=None, context=4096, lists=1, **more
):
    """paged_decode, or with `tokens` ragged_paged_attention of so many tokens in `batch` rows."""
    tokens, value_dim, sink = more.pop("tokens", None), more.get("value_dim"), more.pop("sink", False)
    listed = context // page
    pages = listed * batch * lists
    k = pool(pages, kv_heads, page, head_dim, format_, more.pop("dtype", bf16))
    args = {
        "k_pool": k,
        "v_pool": None if value_dim else k,
        "positions": array((pages + 1, page), i32),
        "table": array((lists, batch, listed), i32),
        "lengths": array((lists, batch), i32),
        "sink_logits": array((heads,), f32) if sink else None,
        "logit_scale": array((pages, kv_heads, page), f32) if more.pop("logit_scale", False) else None,
    }
    if tokens:
        row = array((batch,), i32)
        args["ragged"] = Ragged(
            rows=array((tokens,), i32), starts=row, counts=row, positions=array((tokens,), i32), longest=tokens
        )
        args["q"] = array((tokens, heads, head_dim), bf16)
        op = ragged_attention.ragged_paged_attention
    else:
        args |= {"q_positions": array((batch, queries), i32), "q": array((batch, queries, heads, head_dim), bf16)}
        op = paged_decode.paged_decode
    return Compile(lambda args: op(**args, **more)[:2], (args,), kept=jax.tree.leaves(k)[0])


def flash_of(length=4096, heads=32, kv_heads=8, head_dim=128, value_dim=None, batch=1, dtype=bf16, sink=False, **more):
    args = {
        "q": array((batch, length, heads, head_dim), dtype),
        "k": array((batch, length, kv_heads, head_dim), dtype),
        "v": array((batch, length, kv_heads, value_dim or head_dim), dtype),
        "sink_logits": array((heads,), f32) if sink else None,
        "valid": array((batch, length), jnp.bool_) if more.pop("valid", False) else None,
        "segments": array((batch, length), i32) if more.pop("segments", False) else None,
    }
    return Compile(lambda args: flash.flash_attention(**args, **more)[:2], (args,))


def weight(*shape, format_=None):
    dense = array(shape, bf16)
    return dense if format_ is None else jax.eval_shape(lambda x: tensor.quantize(x, formats.parse(format_)), dense)


def quant_of(format_, tokens=16, d=4096, outputs=12288, activations=None):
    activations = activations and formats.parse(activations)
    w = weight(d, outputs, format_=format_)
    return Compile(lambda x, w: quant.quant_matmul(x, w, activations), (array((tokens, d), bf16), w), kept=w.data)


def grouped_of(format_, tokens=64, experts=64, d=2048, outputs=1536):
    w = weight(experts, d, outputs, format_=format_)
    kept = jax.tree.leaves(w)[0]
    return Compile(grouped.grouped_matmul, (array((tokens, d), bf16), w, array((experts,), i32)), kept=kept)


SLIDING = Mask(window=1024, sinks=4)
MAIN = {  # for every generation
    "paged_decode/page16": paged(page=16),
    "paged_decode/page128": paged(batch=32),
    "paged_decode/all_masks": paged(mask=SLIDING, softcap=30.0, sink=True, batch=16, queries=4, head_dim=64),
    "paged_decode/int8": paged(format_="int8", batch=16, page=64),
    "paged_decode/int4_asym": paged(format_="int4_asym", batch=16),
    "paged_decode/int2_packed": paged(format_="int2_asym", batch=16, mask=Mask(lag=128, skip=64, block=32)),
    "paged_decode/latents": paged(heads=128, kv_heads=1, head_dim=576, value_dim=512, page=64),
    "ragged_paged_attention/all_masks": paged(tokens=64, page=64, mask=SLIDING, softcap=30.0, sink=True),
    "flash_attention/causal": flash_of(),
    "flash_attention/all_masks": flash_of(
        mask=SLIDING, softcap=30.0, sink=True, valid=True, segments=True, head_dim=64, length=1000
    ),
    **{f"quant_matmul/{f}": quant_of(f) for f in ("int8", "int4_g128", "fp8_e4m3")},
    **{f"quant_matmul/{f}_2k": quant_of(f, tokens=2048) for f in ("int8", "int4_g32_asym")},
    "quant_matmul/w8a8_int8": quant_of("int8", activations="int8", tokens=256),
    "quant_matmul/w8a8_fp8": quant_of("fp8_e4m3", activations="fp8_e4m3"),
    **{f"grouped_matmul/{f}": grouped_of(f) for f in (None, "int4_g64_asym")},
    "grouped_matmul/fp8_e4m3_g128_4k": grouped_of("fp8_e4m3_g128", tokens=4096, experts=8),
}
MORE = {  # for the first generation alone, whose unit is the smallest and whose vectors know the fewest types
    "paged_decode/head256": paged(head_dim=256, heads=16, batch=32, page=32),
    "paged_decode/fp8": paged(format_="fp8_e4m3", batch=16),
    "paged_decode/int8_asym_lists_by_head": paged(format_="int8_asym", lists=8),
    "paged_decode/int8_page16": paged(format_="int8", page=16),
    "paged_decode/latents_int8": paged(
        heads=16, kv_heads=1, head_dim=640, value_dim=512, page=64, format_="int8", logit_scale=True
    ),
    "paged_decode/exact": paged(mask=Mask(window=128, sinks=4, block=32), page=64, context=512),
    "ragged_paged_attention/64_int2_packed": paged(tokens=64, format_="int2_asym", mask=Mask(lag=0, skip=4)),
    "ragged_paged_attention/2k_int4": paged(tokens=2048, batch=32, format_="int4"),
    "flash_attention/head256": flash_of(head_dim=256, heads=16),
    "flash_attention/192_128": flash_of(head_dim=192, value_dim=128, heads=16, kv_heads=16, mask=Mask(causal=False)),
    "flash_attention/short": flash_of(length=11, batch=4, valid=True, head_dim=80),
    "quant_matmul/int4_one_token": quant_of("int4", tokens=1, d=14336, outputs=4096),
    "quant_matmul/int8_g64_asym_2k": quant_of("int8_g64_asym", tokens=2048),
    "quant_matmul/few_outputs": quant_of("int8_g128", d=1024, outputs=100),
    "grouped_matmul/int4_g128_4k": grouped_of("int4_g128", tokens=4096, experts=8),
}


# Not a copy of the array, or one into VMEM ahead of its use, which XLA does with small operands.
MOVES = ("parameter", "bitcast", "get-tuple-element", "custom-call", "copy-done")


def copies(text: str, operand) -> list[str]:
    """Instructions of the compiled program that write as many elements of the same width as `operand` has."""
    names = {1: ("s8", "u8", "f8e4m3fn"), 2: ("bf16",), 4: ("f32",)}[operand.dtype.itemsize]
    found = []
    for kind, shape, op in re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", text):
        if op in MOVES or kind not in names:
            continue
        if math.prod(int(n) for n in shape.split(",") if n) == operand.size:
            found.append(f"{op} -> {kind}[{shape}]")
    return found


def compile_one(case: Compile, device, kind: str) -> dict:
    where = SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: array(x.shape, x.dtype, sharding=where), case.args)
    abstract = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("_",), (AxisType.Explicit,), abstract_device=abstract)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh):
        compiled = jax.jit(case.function).trace(*args).lower().compile()
    text = compiled.as_text()
    found = {"seconds": round(time.perf_counter() - start, 2), "kernels": text.count("tpu_custom_call")}
    if case.kept is not None and (copied := copies(text, case.kept)):
        found["error"] = f"the program copies an operand every call: {copied}"
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("archs", nargs="+", choices=CHIPS)
    parser.add_argument("-k", default="", help="only cases whose name holds this text")
    options = parser.parse_args()
    todo = [(arch, name) for name in MAIN for arch in options.archs] + [(options.archs[0], name) for name in MORE]
    todo = [(arch, name) for arch, name in todo if options.k in name]

    # Here and not in the threads: the first call loads libtpu, which can be done once.
    devices = {
        arch: topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[arch][0]).devices[0] for arch in CHIPS
    }

    def one(arch, name):
        try:
            found = compile_one((MAIN | MORE)[name], devices[arch], CHIPS[arch][1])
        except Exception as error:  # whatever the compiler raises is the result of this case
            found = {"error": f"{type(error).__name__}: {str(error)[:1500]}"}
        return json.dumps({"arch": arch, "name": name, **found})

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool_:  # the compiler leaves the interpreter's lock
        for line in pool_.map(one, *zip(*todo)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
