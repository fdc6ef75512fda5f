"""GGUF: values and tensors survive, block formats agree with ggml's, and a damaged file is refused with a reason."""

import dataclasses
import struct
import tracemalloc

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import optx
from optx import ir
from optx.checkpoint.gguf import MAX_ITEMS, read_gguf, write_gguf
from optx.checkpoint.gguf_values import pack_string, pack_value
from optx.errors import CheckpointError, FormatError
from optx.formats import GGML
from optx.ggml import BLOCKS, BLOCKS_BY_ID, PLAIN, PLAIN_BY_ID, UNSUPPORTED_BY_ID

HALVES = {  # the others have two, at 0 and 2
    "MXFP4": (), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,),
}  # fmt: skip

METADATA = {
    "general.architecture": "llama",
    "flag": True,
    "small": 7,
    "negative": -7,
    "large": 1 << 40,
    "float": 0.5,
    "tiny": 1e-300,
    "text": "häß 日本 🤽",
    "empty": "",
    "strings": ["a", "", "🤽"],
    "ints": [1, -2, 3],
    "floats": [0.25, -1.5],
    "flags": [True, False],
    "none": [],
    "nested": [[1, 2], [3]],
}


def random_blocks(name: str, rng, *lead: int) -> np.ndarray:
    """uint8[*lead, bytes] with finite scales that are no float32 subnormals."""
    blocks = rng.integers(0, 256, (*lead, BLOCKS[name].bytes), np.uint8)
    for at in HALVES.get(name, (0, 2)):
        half = blocks[..., at : at + 2].copy().view(np.uint16)
        half[(half & 0x7C00) == 0x7C00] &= 0x83FF
        blocks[..., at : at + 2] = half.view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = blocks[..., 0].clip(2, 250)
    return blocks


@pytest.fixture
def file(tmp_path, rng):
    tensors = {
        "f32": rng.normal(size=(2, 3)).astype(np.float32),
        "f16": rng.normal(size=(5,)).astype(np.float16),
        "bf16": rng.normal(size=(2, 1, 3)).astype(ml_dtypes.bfloat16),
        "i32": np.arange(6, dtype=np.int32).reshape(1, 2, 1, 3),
        "q4_1": ("Q4_1", random_blocks("Q4_1", rng, 4, 2).reshape(4, -1)),
        "q6_k": ("Q6_K", random_blocks("Q6_K", rng, 1)[0]),
    }
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, tensors)
    return path, tensors


@pytest.mark.parametrize("name", BLOCKS)
def test_dequantize_is_ggmls_bit_for_bit(name, rng):
    gguf = pytest.importorskip("gguf")
    block, blocks = BLOCKS[name], random_blocks(name, rng, 32, 4)
    want = gguf.dequantize(blocks.reshape(32, -1), gguf.GGMLQuantizationType[name]).reshape(32, 4, block.elements)
    for dequantize in (block.dequantize, jax.jit(block.dequantize), jax.jit(jax.vmap(block.dequantize))):
        got = np.asarray(dequantize(jnp.asarray(blocks)))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    one = np.asarray(block.dequantize(jnp.asarray(blocks[0, 0])))
    np.testing.assert_array_equal(one, want[0, 0])


def test_type_table_is_ggmls():
    gguf = pytest.importorskip("gguf")
    ids = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    for type_id, block in BLOCKS_BY_ID.items():
        assert (block.name, (block.elements, block.bytes)) == (ids[type_id].name, gguf.GGML_QUANT_SIZES[ids[type_id]])
    for type_id, plain in PLAIN_BY_ID.items():
        assert (plain.name, (1, plain.dtype.itemsize)) == (ids[type_id].name, gguf.GGML_QUANT_SIZES[ids[type_id]])
    for type_id, name in UNSUPPORTED_BY_ID.items():
        assert name == ids[type_id].name


def test_values_and_tensors_survive(file):
    path, tensors = file
    got = read_gguf(path)
    assert got.version == 3 and got.alignment == 32
    assert got.metadata == METADATA | {"tiny": 0.0}  # float32
    assert list(got.tensors) == list(tensors)
    for name, want in tensors.items():
        tensor, data = got.tensors[name], got.tensors[name].read()
        type_name, rows = want if isinstance(want, tuple) else (name.upper(), want)
        assert tensor.type == type_name and tensor.offset % 32 == 0 and data.nbytes == tensor.nbytes
        assert data.dtype == rows.dtype
        np.testing.assert_array_equal(data, rows)
    assert got.tensors["q4_1"].shape == (4, 64) and got.tensors["q6_k"].shape == (256,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.tensors["f32"].offset = 0


def test_the_gguf_package_reads_what_is_written(file):
    gguf = pytest.importorskip("gguf")
    path, tensors = file
    reader = gguf.GGUFReader(path)
    for name, value in METADATA.items():
        if name not in ("nested", "none", "tiny"):
            assert reader.fields[name].contents() == value, name
    assert [reader.fields[key].types[-1].name for key in ("small", "negative", "large", "float", "ints", "floats")] == [
        *("UINT32", "INT32", "INT64", "FLOAT32", "INT32", "FLOAT32"),
    ]
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == {
        name: tensor[0] if isinstance(tensor, tuple) else name.upper() for name, tensor in tensors.items()
    }
    np.testing.assert_array_equal(reader.tensors[0].data, tensors["f32"])


def test_reads_what_the_gguf_package_writes(tmp_path, rng):
    gguf = pytest.importorskip("gguf")
    weights = rng.normal(size=(3, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("byte", 200)
    writer.add_float64("double", 0.1)
    writer.add_array("names", ["x", "y"])
    writer.add_tensor("plain", weights)
    rows = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = read_gguf(tmp_path / "a.gguf")
    assert got.alignment == 64 and (got.metadata["byte"], got.metadata["double"]) == (200, 0.1)
    assert got.metadata["names"] == ["x", "y"]
    np.testing.assert_array_equal(got.tensors["plain"].read(), weights)
    assert got.tensors["packed"].shape == (3, 64)
    np.testing.assert_array_equal(got.tensors["packed"].read(), rows)


def test_numpy_values_keep_their_types():
    assert pack_value(np.uint8(3), "x") == struct.pack("<IB", 0, 3)
    assert pack_value(np.float64(0.1), "x") == struct.pack("<Id", 12, 0.1)
    assert pack_value(np.array([1, 2], np.uint16), "x") == struct.pack("<IIQHH", 9, 2, 2, 1, 2)
    assert pack_value([1, 1 << 40], "x")[:8] == struct.pack("<II", 9, 11)
    assert pack_value(1e300, "x") == struct.pack("<Id", 12, 1e300)


# A damaged header, from parts. One key-value or one tensor, whose own checks are what is tested.


def header(values: bytes = b"", tensors: bytes = b"", n_values=None, n_tensors=None, version=3, magic=b"GGUF") -> bytes:
    n_values = (1 if values else 0) if n_values is None else n_values
    n_tensors = (1 if tensors else 0) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, n_tensors, n_values) + values + tensors
    return head + bytes(-len(head) % 32)


def value(kind: int, data: bytes, key: str = "key") -> bytes:
    return pack_string(key) + struct.pack("<I", kind) + data


def info(dims=(4,), kind=0, offset=0, name="w", n_dims=None) -> bytes:
    n_dims = len(dims) if n_dims is None else n_dims
    return pack_string(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, kind, offset)


HUGE = 1 << 62
BODY = bytes(64)
DAMAGED = {
    "empty": (b"", "magic: got 4 bytes"),
    "magic": (header(magic=b"GGML"), r"magic: got b'GGML'.*GGUF"),
    "version": (header(version=1), "version: got 1, allowed: 2 or 3"),
    "byte order": (header(version=3 << 24), "version: got 3 in big-endian order"),
    "values": (header(n_values=HUGE), f"number of key-values: got {HUGE}, allowed: at most"),
    "tensors": (header(n_tensors=HUGE), f"number of tensors: got {HUGE}"),
    "key length": (header(struct.pack("<Q", 1 << 20) + bytes(1 << 21), n_values=1), "length of key 0.*at most 65535"),
    "key text": (header(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(99), n_values=1), "key 0: got .*UTF-8"),
    "value type": (header(value(13, bytes(8))), "type of metadata 'key': got 13, allowed: 0 to 12"),
    "bool": (header(value(7, b"\x02")), "metadata 'key': got the byte 2 as a bool"),
    "string length": (header(value(8, struct.pack("<Q", HUGE))), f"length of metadata 'key': got {HUGE}"),
    "array type": (header(value(9, struct.pack("<IQ", 99, 1))), "item type of metadata 'key': got 99"),
    "array length": (header(value(9, struct.pack("<IQ", 4, HUGE))), f"length of metadata 'key': got {HUGE}"),
    "array in array": (header(value(9, struct.pack("<IQ", 9, 1) * 9)), "nesting of metadata 'key': got 5"),
    "array string": (header(value(9, struct.pack("<IQQ", 8, 1, HUGE))), f"a string in metadata 'key': got {HUGE}"),
    "key twice": (header(value(7, b"\1") * 2, n_values=2), "metadata key: got 'key' twice"),
    "alignment": (header(value(4, struct.pack("<I", 24), "general.alignment")), "general.alignment: got 24"),
    "alignment type": (header(value(8, pack_string("8"), "general.alignment")), "general.alignment: got '8'"),
    "dimensions": (header(tensors=info((1,) * 5)) + BODY, "'w': number of dimensions: got 5, allowed: 0 to 4"),
    "many dimensions": (header(tensors=info(n_dims=1 << 31)) + BODY, "'w': number of dimensions"),
    "zero": (header(tensors=info((4, 0))) + BODY, r"'w': dimensions: got \[4, 0\]"),
    "overflow": (header(tensors=info((1 << 32, 1 << 32))) + BODY, r"F32 of shape .*got 73786976294838206464 bytes"),
    "type": (header(tensors=info(kind=77)) + BODY, r"'w': type: got unknown \(id 77\), allowed: F32,"),
    "known type": (header(tensors=info(kind=16)) + BODY, r"'w': type: got IQ2_XXS \(id 16\)"),
    "blocks": (header(tensors=info((48,), kind=8)) + BODY, r"last axis of \(48,\).*a multiple of Q8_0's 32"),
    "scalar block": (header(tensors=info((), kind=8)) + BODY, r"last axis of \(\)"),
    "misaligned": (
        header(tensors=info(offset=8)) + BODY,
        "'w': offset: got 8, allowed: a multiple of the alignment 32",
    ),
    "outside": (header(tensors=info(offset=64)) + BODY, "'w': F32 of shape .* up to the file's end"),
    "far outside": (header(tensors=info(offset=HUGE)) + BODY, "'w': F32 of shape"),
    "name twice": (header(tensors=info() * 2, n_tensors=2) + BODY, "tensor name: got 'w' twice"),
    "name length": (header(tensors=struct.pack("<Q", 1 << 40) + bytes(99)), "length of tensor name"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_with_a_reason(case, tmp_path):
    data, message = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value) and "allowed:" in str(error.value)


def test_the_undamaged_header_reads(tmp_path):
    path = tmp_path / "good.gguf"
    for version in (2, 3):
        path.write_bytes(header(value(7, b"\1"), info((4, 2)), version=version) + BODY)
        got = read_gguf(path)
        assert got.metadata == {"key": True} and got.tensors["w"].shape == (2, 4)


def test_absurd_counts_allocate_nothing(tmp_path):
    path = tmp_path / "bad.gguf"
    with open(path, "wb") as file:  # sparse: 256 MiB that take no space
        file.write(header(value(9, struct.pack("<IQ", 0, 200 << 20))))
        file.truncate(256 << 20)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"at most {MAX_ITEMS}"):
        read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_every_truncation_is_refused(file, tmp_path):
    data = file[0].read_bytes()
    path = tmp_path / "short.gguf"
    for size in range(len(data) - 32):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_flipped_bytes_never_escape_as_other_errors(file, tmp_path, rng):
    data = bytearray(file[0].read_bytes())
    path = tmp_path / "flipped.gguf"
    refused = 0
    for at in range(read_gguf(file[0]).tensors["f32"].offset):
        flipped = data.copy()
        flipped[at] ^= int(rng.integers(1, 256))
        path.write_bytes(flipped)
        try:
            for tensor in read_gguf(path).tensors.values():
                tensor.read()
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_missing_and_shrunk_files(tmp_path, file):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read a GGUF file here"):
            read_gguf(path)
    got = read_gguf(file[0])
    with open(file[0], "r+b") as handle:
        handle.truncate(got.tensors["q6_k"].offset + 8)
    with pytest.raises(CheckpointError, match=r"'q6_k': got 8 of 210 bytes"):
        got.tensors["q6_k"].read()
    got.tensors["f32"].read()


BAD_WRITES = {
    "dtype": ({}, {"w": np.zeros(2, np.complex64)}, "complex64"),
    "rank": ({}, {"w": np.zeros((1,) * 5, np.float32)}, "up to 4 dimensions"),
    "empty": ({}, {"w": np.zeros((2, 0), np.float32)}, "at least one element"),
    "block name": ({}, {"w": ("Q9", np.zeros(18, np.uint8))}, "block type 'Q9'"),
    "block bytes": ({}, {"w": ("Q4_0", np.zeros(19, np.uint8))}, "whole 18-byte blocks"),
    "value": ({"k": None}, {}, "metadata 'k': got NoneType"),
    "mixed": ({"k": [1, "a"]}, {}, "mixed types"),
    "wide": ({"k": 1 << 70}, {}, "64 bits"),
    "surrogate": ({"k": "\ud800"}, {}, "lone surrogate"),
    "alignment": ({"general.alignment": 3}, {}, "power of two"),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_what_gguf_cannot_hold_is_refused(case, tmp_path):
    metadata, tensors, message = BAD_WRITES[case]
    with pytest.raises(FormatError, match=message):
        write_gguf(tmp_path / "w.gguf", metadata, tensors)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.gguf"
    write_gguf(path, {"n": 1}, {})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_gguf(path, {"n": 2}, {"w": np.zeros(3, np.float32)})
    assert read_gguf(path).metadata == {"n": 1} and [entry.name for entry in tmp_path.iterdir()] == ["w.gguf"]


@pytest.mark.parametrize(
    ("fixture", "parameters", "names"),
    [
        ("smollm2_path", 134_515_008, ["token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"]),
        ("gemma_path", 268_098_176, ["blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.0.attn_v.weight"]),
    ],
)
def test_a_real_file(fixture, parameters, names, request):
    gguf = pytest.importorskip("gguf")
    path = request.getfixturevalue(fixture)
    got = read_gguf(path)
    assert sum(np.prod(tensor.shape) for tensor in got.tensors.values()) == parameters
    last = max(got.tensors.values(), key=lambda tensor: tensor.offset)
    assert last.offset + last.nbytes == path.stat().st_size
    for name in names:
        tensor = got.tensors[name]
        rows = tensor.read()[:256]
        want = gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor.type])
        if tensor.type not in PLAIN:
            block = BLOCKS[tensor.type]
            rows = np.asarray(jax.jit(block.dequantize)(rows.reshape(len(rows), -1, block.bytes))).reshape(want.shape)
        assert want.shape == (min(tensor.shape[0], 256), *tensor.shape[1:]) and 0 < np.abs(want).mean() < 10
        np.testing.assert_array_equal(rows.view(np.uint32), want.view(np.uint32))


def _blocks_of(name: str, rng, rows: np.ndarray) -> np.ndarray:
    """Random blocks of the size of `rows` [..., D], with scales that make weights of some hundredths."""
    block = BLOCKS[name]
    count = rows.shape[-1] // block.elements
    blocks = random_blocks(name, rng, *rows.shape[:-1], count)
    size = {"Q2_K": 8, "Q3_K": 64, "Q4_K": 256, "Q5_K": 512, "Q6_K": 1024, "Q8_0": 64, "MXFP4": 1}.get(name, 8)
    for at in HALVES.get(name, (0, 2)):
        scale = (rng.normal(size=blocks.shape[:-1]) * 0.05 / size).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(120, 124, blocks.shape[:-1], np.uint8)
    return blocks.reshape(*rows.shape[:-1], -1)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_model_of_such_blocks_runs_packed(name, tmp_path, rng):
    """Its blocks stay as they are in the file, and its logits are those of the dense weights that they stand for."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = families.concrete("llama", **sizes)
    path = families.write_llama_gguf(
        tmp_path / "model.gguf", model, lambda rows: (name, _blocks_of(name, rng, rows)), **sizes
    )
    packed, dense = optx.load(path, weights="packed"), optx.load(path)
    assert set(packed.origin.formats.values()) == {str(GGML(block=name))} and len(packed.origin.formats) == 9
    tokens = np.arange(24, dtype=np.int32)[None]
    compiled = optx.compile(packed)
    np.testing.assert_allclose(
        compiled.logits(tokens), optx.compile(dense).logits(tokens), rtol=1e-4, atol=1e-4, err_msg=name
    )
    stored = ir.weight_bytes(packed.tree) / ir.weight_count(packed.tree)
    assert stored < 1.1 * BLOCKS[name].bytes / BLOCKS[name].elements + 0.1
