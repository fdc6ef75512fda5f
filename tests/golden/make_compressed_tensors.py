"""Makes compressed_tensors.safetensors: what the compressed-tensors package makes of one small matrix in each format.

    python tests/golden/make_compressed_tensors.py      (torch and compressed-tensors in an environment of their own)

`matrix` is float32 [out, in]; `SCHEME.NAME` are the tensors of a module's state that the package writes, scales as it observes
them (`calculate_qparams`, int scales rounded to float16 before the codes are made), `SCHEME.dequantized` what it reads back.
"""

from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

INT = {"type": "int", "dynamic": False}
FLOAT = {"type": "float", "symmetric": True, "dynamic": False}
MX = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
NV = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
GROUP, CHANNEL = {"strategy": "group", "group_size": 32}, {"strategy": "channel"}
SCHEMES = {  # name -> format, args of the weights
    "int4_g32": ("pack-quantized", INT | GROUP | {"num_bits": 4, "symmetric": True}),
    "int4_g32_asym": ("pack-quantized", INT | GROUP | {"num_bits": 4, "symmetric": False}),
    "int8": ("pack-quantized", INT | CHANNEL | {"num_bits": 8, "symmetric": True}),
    "int8_asym": ("pack-quantized", INT | CHANNEL | {"num_bits": 8, "symmetric": False}),
    "int8_w8a8": ("int-quantized", INT | CHANNEL | {"num_bits": 8, "symmetric": True}),
    "fp8_e4m3": ("float-quantized", FLOAT | CHANNEL | {"num_bits": 8}),
    "fp8_block": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}),
    "mxfp4": ("mxfp4-pack-quantized", FLOAT | MX | {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "nvfp4": ("nvfp4-pack-quantized", FLOAT | NV | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
}


def groups(x: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """x [F, D] as [rows of scales, columns of scales, numbers that share one]."""
    f, d = x.shape
    if args.strategy == "channel":
        return x[:, None, :]
    if args.strategy == "block":
        high, wide = args.block_structure
        x = torch.nn.functional.pad(x, (0, -d % wide, 0, -f % high))
        x = x.reshape(x.shape[0] // high, high, x.shape[1] // wide, wide)
        return x.transpose(1, 2).flatten(2)
    return x.reshape(f, -1, args.group_size)


def state(x: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    low, high = groups(x, args).amin(-1), groups(x, args).amax(-1)
    whole = generate_gparam(x.min(), x.max()).reshape(1) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    scale = scale.to(torch.float16).float() if args.type == "int" else scale.float()
    given = {"weight": x, "weight_scale": scale}
    if whole is not None:
        given["weight_global_scale"] = whole
    if not args.symmetric:  # of the rounded scale, as optx has it
        smallest = torch.clamp(low, max=0)
        given["weight_zero_point"] = torch.clamp(torch.round(-smallest / scale), 0, 2**args.num_bits - 1)
        given["weight_zero_point"] = (given["weight_zero_point"] - 2 ** (args.num_bits - 1)).to(torch.int8)
    return given


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn((9, 128), generator=generator) * torch.exp(torch.randn((9, 1), generator=generator) / 2)
    out = {"matrix": matrix}
    for name, (form, given) in SCHEMES.items():
        args = QuantizationArgs(**given)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(state(matrix, args), scheme)
        packed.pop("weight_zero_point") if args.symmetric and "weight_zero_point" in packed else None
        out |= {f"{name}.{last}": value for last, value in packed.items()}
        out[f"{name}.dequantized"] = compressor.decompress(dict(packed), scheme)["weight"].float()
    path = Path(__file__).parent / "compressed_tensors.safetensors"
    save_file({name: value.contiguous() for name, value in out.items()}, path)
    path.chmod(0o644)


if __name__ == "__main__":
    main()
