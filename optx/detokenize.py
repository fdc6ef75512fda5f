"""Token ids back to text: every id stands for some bytes, and text is those bytes read as UTF-8.

Working in bytes makes decoding a sum over tokens, so that a stream costs the same for each token however long the
text before it, and a character whose bytes come from several tokens appears once it is whole.
"""

import codecs
import json
from collections.abc import Iterable

import tokenizers

from optx.errors import CheckpointError, RequestError

_SPACE = "\u2581"  # SentencePiece's visible space
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


class Detokenizer:
    """The bytes of every token of a byte-level or SentencePiece vocabulary."""

    def __init__(self, backend: tokenizers.Tokenizer):
        """Raises CheckpointError for a decoder of another kind."""
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._cache: dict[int, bytes] = {}
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        self._byte_level = kinds == {"ByteLevel"}
        if not self._byte_level and not (kinds <= _SENTENCEPIECE_STEPS and kinds & {"Replace", "Metaspace"}):
            got = ", ".join(sorted(kinds)) or "none"
            raise CheckpointError(
                f"tokenizer.json decoder: got {got}, allowed: ByteLevel, or SentencePiece's "
                f"{', '.join(sorted(_SENTENCEPIECE_STEPS))}"
            )
        self._byte_tokens = _BYTE_TOKENS if "ByteFallback" in kinds else {}
        self.strips_space = any(
            step.get("start") or step.get("prepend_scheme") in ("always", "first") for step in steps
        )  # text is encoded with a space put in front, which decoding takes away again

    def token(self, index: int) -> bytes:
        """The bytes of one token, b"" for an id past the vocabulary (rows that pad an embedding)."""
        data = self._cache.get(index)
        if data is None:
            data = self._cache[index] = self._token(index)
        return data

    def is_special(self, index: int) -> bool:
        added = self._added.get(index)
        return added is not None and added.special

    def join(self, ids: Iterable[int], skip_special: bool) -> str:
        """Text of all the ids; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(self.token(i) for i in ids if not (skip_special and self.is_special(i)))
        return data.decode("utf-8", errors="replace")

    def _token(self, index: int) -> bytes:
        if index < 0:
            raise RequestError(f"token id: got {index}, allowed: 0 and up")
        text = self._backend.id_to_token(index)
        if text is None:
            return b""
        if not self._byte_level:
            return self._byte_tokens.get(text) or text.replace(_SPACE, " ").encode("utf-8")
        if index not in self._added and all(char in _BYTE_OF for char in text):
            return bytes(_BYTE_OF[char] for char in text)
        return text.encode("utf-8")


class TokenStream:
    """Text as its tokens arrive. `push` gives what the token completes, `finish` what was left unfinished."""

    def __init__(self, detokenizer: Detokenizer, skip_special: bool):
        self._detokenizer = detokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """New text, "" while a character is incomplete."""
        if self._skip_special and self._detokenizer.is_special(index):
            return ""
        return self._utf8.decode(self._detokenizer.token(index))

    def finish(self) -> str:
        """U+FFFD if the last character never became whole, else ""."""
        return self._utf8.decode(b"", final=True)


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]
