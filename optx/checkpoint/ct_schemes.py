"""How the formats of weights lie in compressed-tensors checkpoints, by the layouts of the package of that name.

Only formats that readers run (vLLM, SGLang) have a scheme; the others are refused with what to choose in their place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optx.errors import FormatError
from optx.formats import Float4, Float8, Float8Block, Format, Int, fp4
from optx.tensor import QTensor

Tensors = dict[str, np.ndarray]  # by the last part of the name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one format lies in files: what `config_groups` say of it, and the tensors of a matrix [D, F]."""

    format: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None
    tensors: Callable[[QTensor], Tensors]

    def group(self, targets: list[str]) -> dict[str, Any]:
        return {
            "targets": targets,
            "weights": self.weights,
            "input_activations": self.inputs,
            "output_activations": None,
            "format": self.format,
        }


def _args(bits: int, kind: str, strategy: str, **more) -> dict[str, Any]:
    """A `QuantizationArgs` of the package."""
    given = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": None}
    return given | {"dynamic": False} | more


def _grouped(bits: int, kind: str, group: int | None, **more) -> dict[str, Any]:
    return _args(bits, kind, "group" if group else "channel", group_size=group, **more)


def _of_int(weight: QTensor, activations: Format | None) -> Scheme:
    format_ = weight.format
    if format_.width not in (4, 8):
        raise FormatError("readers take integers of 4 and of 8 bits; choose int4 in the recipe")
    scale = _scale_dtype(format_.scale_dtype, jnp.dtype(weight.dtype))
    weights = _grouped(format_.width, "int", format_.group, symmetric=format_.symmetric)
    if activations is None:
        return Scheme(format="pack-quantized", weights=weights, tensors=functools.partial(_packed_ints, scale=scale))
    if format_ != Int(width=8, scale_dtype=format_.scale_dtype) or not _like(activations, Int(width=8)):
        raise FormatError(
            f"with activations in {activations}; readers round them to int8 a token before symmetric int8 weights with a scale "
            "a channel; drop 'group' and 'symmetric: false', or leave the activations as they are"
        )
    inputs = _args(8, "int", "token", dynamic=True)
    return Scheme(
        format="int-quantized", weights=weights, inputs=inputs, tensors=functools.partial(_plain, scale=scale)
    )


def _of_float8(weight: QTensor, activations: Format | None) -> Scheme:
    format_ = weight.format
    if format_.kind != "e4m3":
        raise FormatError("readers take fp8 as e4m3; choose fp8_e4m3 in the recipe")
    if format_.group is not None:
        raise FormatError("readers have no groups of fp8; drop 'group', or choose fp8_block in the recipe")
    if activations is not None and not _like(activations, Float8(kind="e4m3")):
        raise FormatError(
            f"with activations in {activations}; readers round them to fp8_e4m3 a token before such weights"
        )
    inputs = None if activations is None else _args(8, "float", "token", dynamic=True)
    tensors = functools.partial(_plain, scale=jnp.float32)
    return Scheme(format="float-quantized", weights=_grouped(8, "float", None), inputs=inputs, tensors=tensors)


def _of_float8_block(weight: QTensor, activations: Format | None) -> Scheme:
    """Readers have kernels for blocks with activations rounded a token and 128 channels only: the file asks for that."""
    side = weight.format.group
    if side != 128:
        raise FormatError("readers take blocks of 128 x 128; drop 'group'")
    if weight.length % side:
        raise FormatError(
            f"its {weight.length} inputs are no multiple of 128, which readers round activations by; choose fp8_e4m3"
        )
    if activations is not None and not _like(activations, Float8(kind="e4m3", group=side)):
        raise FormatError(
            f"with activations in {activations}; readers round them to fp8_e4m3_g{side} before such weights"
        )
    weights = _args(8, "float", "block", block_structure=[side, side])
    inputs = _args(8, "float", "group", group_size=side, dynamic=True)
    tensors = functools.partial(_plain, scale=jnp.float32)
    return Scheme(format="float-quantized", weights=weights, inputs=inputs, tensors=tensors)


def _of_float4(weight: QTensor, activations: Format | None) -> Scheme:
    format_ = weight.format
    if activations is not None:
        raise FormatError(
            f"with activations in {activations}; export the weights without, by a recipe that leaves x as it is"
        )
    if format_.kind == "mx":
        weights = _args(
            4, "float", "group", group_size=format_.group, scale_dtype="torch.uint8", zp_dtype="torch.uint8"
        )
        return Scheme(format="mxfp4-pack-quantized", weights=weights, tensors=_mx)
    types = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    weights = _args(4, "float", "tensor_group", group_size=format_.group, **types)
    return Scheme(format="nvfp4-pack-quantized", weights=weights, tensors=_nv)


SCHEMES: dict[type[Format], Callable[..., Scheme]] = {
    Int: _of_int, Float8: _of_float8, Float8Block: _of_float8_block, Float4: _of_float4,
}  # fmt: skip


def _like(got: Format, want: Format) -> bool:
    return str(got) == str(want)


def _scale_dtype(stored: str, dtype):
    """The model's dtype where it holds every stored scale, else float32: a reader's product is then the one of optx."""
    return dtype if jnp.promote_types(stored, dtype) == dtype else jnp.float32


def _packed_ints(w: QTensor, scale) -> Tensors:
    """Unsigned codes as little-endian int32 words, the first number in the lowest bits; zero points so along the outputs."""
    codes = np.asarray(w.data)
    if codes.dtype == np.int8:
        codes = codes.view(np.uint8) ^ np.uint8(0x80)
    tensors = {"weight_packed": _words(codes), "weight_scale": np.asarray(w.scale).astype(scale)}
    tensors["weight_shape"] = np.array([w.data.shape[0], w.length], np.int64)
    if w.zero is not None:
        zero = np.asarray(w.zero).T
        if w.format.width == 4:
            zero = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
            zero = zero[:, ::2] | zero[:, 1::2] << 4
        tensors["weight_zero_point"] = np.ascontiguousarray(_words(zero).T)
    return tensors


def _words(codes: np.ndarray) -> np.ndarray:
    """uint8[rows, bytes] -> int32[rows, ceil(bytes / 4)]."""
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))
    return np.ascontiguousarray(padded).view("<i4")


def _plain(w: QTensor, scale) -> Tensors:
    return {"weight": np.asarray(w.data), "weight_scale": np.asarray(w.scale).astype(scale)}


def _mx(w: QTensor) -> Tensors:
    return {"weight_packed": np.asarray(w.data), "weight_scale": np.asarray(w.scale)}


def _nv(w: QTensor) -> Tensors:
    """Of a weight whose rows all have one outer scale."""
    blocks, outer = fp4.nv_split(w.scale)
    return {
        "weight_packed": np.asarray(w.data),
        "weight_scale": np.asarray(blocks.astype(jnp.float8_e4m3fn)),
        "weight_global_scale": np.float32(1) / np.asarray(outer).reshape(-1)[:1],
    }


def one_outer(weights: list[QTensor]) -> list[QTensor]:
    """nvfp4 weights [D, F] with one outer scale for all their rows, a power of two where they differ.

    The scales of blocks are rounded to e4m3 again then, and codes to what is nearest under them.
    """
    outers = np.concatenate([np.asarray(fp4.nv_split(w.scale)[1]).reshape(-1) for w in weights])
    if (outers == outers[0]).all():
        return weights
    largest = max(float(jnp.max(jnp.abs(values(w)))) for w in weights)
    outer = np.float32(2.0 ** np.ceil(np.log2(largest / (fp4.TOP * fp4.E4M3_TOP)))) if largest else np.float32(1)
    return [_under(w, outer) for w in weights]


@jax.jit
def _under(w: QTensor, outer) -> QTensor:
    format_, x = w.format, values(w)
    blocks, outers = fp4.nv_split(w.scale)
    blocks = jnp.clip(blocks * (outers / outer), fp4.E4M3_LEAST, fp4.E4M3_TOP).astype(jnp.float8_e4m3fn)
    scale = fp4.nv_join(blocks, jnp.broadcast_to(outer, outers.shape))
    parts = format_.assemble(format_.code(x, *format_.steps(scale, None, w.length)), scale, None)
    return dataclasses.replace(w, data=parts.data, scale=parts.scale)


def values(w: QTensor) -> jax.Array:
    """Dequantized in storage order, float32[F, D]."""
    return dataclasses.replace(w, dtype=jnp.dtype("float32")).rows()
