"""Block formats of GGUF files."""

import dataclasses
from typing import ClassVar

from optx.errors import FormatError
from optx.formats.base import Format
from optx.ggml import BLOCKS

# Formats that optx writes.
WRITTEN = ("int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2", "fp8_block", "mxfp4", "nvfp4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGML(Format):
    """A block format of GGUF files, kept as the file's own bytes: uint8[..., blocks * bytes]."""

    can_encode: ClassVar[bool] = False
    block: str

    def __str__(self):
        name = self.block.lower()
        return f"gguf_{name}" if name in WRITTEN else name  # its MXFP4 lies otherwise than the one of `Float4`

    def check(self, length):
        n = BLOCKS[self.block].elements
        return f"{self}: axis of {length} is not a multiple of the block of {n}" if length % n else None

    def packed(self, length):
        return length // BLOCKS[self.block].elements * BLOCKS[self.block].bytes

    def grouped(self, length):
        return None

    def bits(self, length):
        return 8 * BLOCKS[self.block].bytes / BLOCKS[self.block].elements

    def encode(self, x):
        raise FormatError(
            f"{self} is a file format that optx reads but does not write; quantize to {', '.join(WRITTEN)}"
        )

    def decode(self, parts, length, dtype):
        block = BLOCKS[self.block]
        *lead, size = parts.data.shape
        blocks = parts.data.reshape(*lead, size // block.bytes, block.bytes)
        return block.dequantize(blocks).astype(dtype).reshape(*lead, length)
