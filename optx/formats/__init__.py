"""Storage formats of tensors."""

import dataclasses
import re

from optx.errors import FormatError, did_you_mean
from optx.formats.affine import Affine, PerChannel
from optx.formats.base import Format, Parts
from optx.formats.blocks import GGML, WRITTEN
from optx.formats.codebook import Codebook, CodebookQJL, parse_codebook
from optx.formats.float4 import Float4
from optx.formats.float8 import Float8, Float8Block, Float8Static
from optx.formats.ints import Int
from optx.formats.lossless import Lossless, parse_lossless
from optx.formats.parted import Parted
from optx.formats.trellis import Trellis, parse_trellis
from optx.ggml import BLOCKS

__all__ = [
    "GGML",
    "NAMES",
    "Affine",
    "Codebook",
    "CodebookQJL",
    "Float4",
    "Float8",
    "Float8Block",
    "Float8Static",
    "Format",
    "Int",
    "Lossless",
    "Parted",
    "Parts",
    "PerChannel",
    "Trellis",
    "parse",
    "writable",
]

NAMES = WRITTEN
CODEBOOKS = (*(str(Codebook(width=b)) for b in (1, 2, 3, 4)), *(str(CodebookQJL(width=b)) for b in (2, 3, 4)))
_TEXT = re.compile(
    r"(?:int(?P<width>\d+)|fp8_(?P<kind>e4m3|e5m2|block)|(?P<fp4>mx|nv)fp4)(?:_g(?P<group>\d+))?(?P<asym>_asym)?"
    r"(?:_clip(?P<clip>0\.\d+))?"
)


def parse(text: str) -> Format:
    """`int4_g64`, `int8_asym`, `fp8_e4m3`, `mxfp4`, `q4_1` -> Format. Inverse of `str(format)`.

    A block type's own name in capitals, `MXFP4`, is that of the file.

    Raises: FormatError naming the nearest known format.
    """
    block = text.removeprefix("gguf_").upper()
    if block in BLOCKS and text not in NAMES:
        return GGML(block=block)
    if own := parse_lossless(text) or parse_trellis(text) or parse_codebook(text):
        return own
    match = _TEXT.fullmatch(text)
    if match is None or ((match["asym"] or match["clip"]) and not match["width"]):
        known = (*NAMES, str(Lossless()), str(Trellis()), *CODEBOOKS, *(str(GGML(block=name)) for name in BLOCKS))
        raise FormatError(f"format {text!r} is not known{did_you_mean(text, known)}")
    group = int(match["group"]) if match["group"] else None
    if match["kind"] == "block":
        return Float8Block(group=group)
    if match["kind"]:
        return Float8(kind=match["kind"], group=group)
    if match["fp4"]:
        return Float4(kind=match["fp4"], group=group)
    return Int(width=int(match["width"]), group=group, symmetric=not match["asym"], clip=float(match["clip"] or 1))


def writable(name: str, *, symmetric: bool = True, **fields) -> Format:
    """The format called `name` (one of NAMES) with `fields` set. Raises FormatError for what it cannot have."""
    if name not in NAMES:
        raise FormatError(f"format {name!r} is not one that optx writes{did_you_mean(name, NAMES)}")
    format_ = dataclasses.replace(parse(name), **fields)
    if symmetric:
        return format_
    if not isinstance(format_, Int):
        raise FormatError(f"{name} has no zero point; set symmetric: true")
    return dataclasses.replace(format_, symmetric=False)
