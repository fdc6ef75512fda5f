"""Text to token ids and back, from a Hugging Face directory or a GGUF file's metadata."""

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import processors

from optx.checkpoint import gguf_vocab
from optx.detokenize import Detokenizer, TokenStream
from optx.errors import CheckpointError, RequestError

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's vocabulary, its rules for special tokens and its chat template.

    Text is data: a literal `<|im_end|>` in it is encoded as those ten characters unless `parse_special` is set.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        if add_bos and bos_id is None:
            raise CheckpointError(
                "tokenizer: add_bos_token is true, but no bos token is named or the one named is not in the vocabulary"
            )
        backend.no_padding()
        backend.no_truncation()
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)  # generation stops at any of them
        self.add_bos = add_bos  # encode puts bos_id first
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})  # "bos_token" etc. to text, for chat templates
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        self._backend = backend
        self._detokenizer = Detokenizer(backend)
        self._lock = threading.Lock()  # `encode_special_tokens` is a setting of the backend, not of a call

    @classmethod
    def from_hf_dir(cls, path: str | os.PathLike) -> "Tokenizer":
        """From tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json,
        generation_config.json, config.json and chat_template.jinja. Raises CheckpointError."""
        folder = Path(path)
        backend = _load_backend(folder / "tokenizer.json")
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
        bos_id = _id_of(backend, special.get("bos_token"))
        eos_ids = {_id_of(backend, special.get("eos_token"))} | _generation_eos(folder)
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=eos_ids - {None},
            add_bos=add_bos,
            chat_template=_chat_template(folder, config),
            special_tokens=special,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> "Tokenizer":
        """From the `tokenizer.*` keys of a GGUF file. Raises CheckpointError, naming the key.

        An end token that the file wants appended (`add_eos_token`) is not: text is encoded to be continued.
        """
        vocabulary = gguf_vocab.read_vocabulary(metadata)
        tokens, size = vocabulary.tokens, len(vocabulary.tokens)
        bos, eos, unknown, pad, eot, eom = (
            gguf_vocab.token_id(metadata, name, size) for name in ("bos", "eos", "unknown", "padding", "eot", "eom")
        )
        named = {"bos_token": bos, "eos_token": eos, "unk_token": unknown, "pad_token": pad}
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"tokenizer.chat_template: got {type(template).__name__}, allowed: text")
        if vocabulary.add_bos and bos is not None:  # for other readers of what `save` writes
            pieces = [("bos", bos)]
            vocabulary.backend.post_processor = processors.TemplateProcessing("bos $A", "bos $A $B", pieces)
        return cls(
            vocabulary.backend,
            bos_id=bos,
            eos_ids=({eos, eot, eom} | vocabulary.turn_ends()) - {None},
            add_bos=vocabulary.add_bos,
            chat_template=template,
            special_tokens={name: tokens[index] for name, index in named.items() if index is not None},
        )

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        add_special: begin with `bos_id` where the model wants it. parse_special: literal special tokens become their
        ids; for prompts that `chat` has written, which hold their own beginning: `add_special=False`.
        Raises RequestError for text that UTF-8 cannot hold.
        """
        if not isinstance(text, str):
            raise RequestError(f"text: got {type(text).__name__}, allowed: str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            got = f"a lone surrogate {text[error.start]!r} at character {error.start}"
            raise RequestError(f"text: got {got}, allowed: valid Unicode") from error
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_special and self.add_bos else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str:
        """Text of token ids, the inverse of `encode`.

        A SentencePiece vocabulary that encodes text with a space in front loses one leading space here, unless the
        ids continue an earlier text. Ids past the vocabulary have no text. Raises RequestError for a negative id.
        """
        text = self._detokenizer.join((int(index) for index in ids), skip_special)
        return text.removeprefix(" ") if self._detokenizer.strips_space and not continues else text

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one token stands for, b"" past the vocabulary. Raises RequestError for a negative id."""
        return self._detokenizer.token(index)

    def agreement(self, other: "Tokenizer") -> float:
        """Share of its tokens that have the same id in another vocabulary."""
        mine, others = self._backend.get_vocab(), other._backend.get_vocab()
        return sum(others.get(token) == index for token, index in mine.items()) / max(len(mine), 1)

    def is_special(self, index: int) -> bool:
        """Whether a token is one of the model's marks (end of text, of a turn) and no text."""
        return self._detokenizer.is_special(index)

    def stream(self, skip_special: bool = True) -> TokenStream:
        """Text of generated ids as they come: `push(id)` gives new text, never part of a character."""
        return TokenStream(self._detokenizer, skip_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **variables: object,
    ) -> str:
        """The prompt for a conversation: `encode(chat(...), add_special=False, parse_special=True)`.

        Further variables (`enable_thinking=False`) go to the template as they are. Raises RequestError without a
        template and for messages that it refuses.
        """
        if self.chat_template is None:
            raise RequestError("messages: this model has no chat template; send a plain prompt instead")
        given = {**self.special_tokens, **variables, "add_generation_prompt": add_generation_prompt, "tools": tools}
        from optx.chat_template import render  # jinja is slow to import

        return render(self.chat_template, messages, given)

    def save(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the end tokens in generation_config.json (whose other
        fields stay), from which `from_hf_dir` makes the same tokenizer."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"), pretty=False)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write_json(folder / "tokenizer_config.json", config)
        generation = _read_json(folder / "generation_config.json")
        ends = {"bos_token_id": self.bos_id, "eos_token_id": sorted(self.eos_ids)}
        _write_json(folder / "generation_config.json", generation | {k: v for k, v in ends.items() if v is not None})


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; for a model that has only tokenizer.model or vocab.json, write one with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no exception type of its own: it raises this one
        raise CheckpointError(f"{path}: not a tokenizer: {error}; fetch the file again") from error


def _read_json(path: Path) -> dict:
    """The object in a JSON file, {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, allowed: a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}; fetch the file again") from error


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_text(value: object) -> str | None:
    """A special token as tokenizer_config.json has it: text, or an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _id_of(backend: tokenizers.Tokenizer, text: str | None) -> int | None:
    return None if text is None else backend.token_to_id(text)


def _generation_eos(folder: Path) -> set[int]:
    """`eos_token_id` of generation_config.json or, as transformers does without one, of config.json."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(index) is int and index >= 0 for index in ids):
            raise CheckpointError(f"{folder / name}: eos_token_id: got {value!r}, allowed: token ids")
        return set(ids)
    return set()


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's, of which the one named "default" if there are several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
