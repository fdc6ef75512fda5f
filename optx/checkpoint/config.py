"""Strict reading of foreign configs: a field neither handled nor known to be harmless is an error that names it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from optx.errors import ConfigError

# Say nothing about the forward pass, in any family.
HARMLESS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache _name_or_path initializer_range "
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id attention_dropout hidden_dropout_prob "
    "auto_map task_specific_params id2label label2id _attn_implementation use_return_dict torchscript "
    "output_attentions output_hidden_states return_dict is_decoder is_encoder_decoder add_cross_attention "
    "chunk_size_feed_forward problem_type finetuning_task prefix tokenizer_class cross_attention_hidden_size "
    "tie_encoder_decoder pruned_heads use_bidirectional_attention quantization_config_note".split()
)
MISSING: Any = object()


@dataclasses.dataclass
class Fields:
    """A config being read: `take` what is handled, then `done` refuses what is left."""

    data: Mapping[str, Any]
    where: str  # file, for messages
    seen: set[str] = dataclasses.field(default_factory=set)

    def take(self, name: str, kind: type | tuple[type, ...] = int, default: Any = MISSING) -> Any:
        """The value of `name`, checked against `kind`; null counts as absent. Raises ConfigError."""
        self.seen.add(name)
        value = self.data.get(name)
        if value is None:
            if default is MISSING:
                raise ConfigError(f"{self.where}: {name!r} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float)):
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError(f"{self.where}: {name!r} is {value!r}; allowed: {kinds}")
        if kind in (int, float) and not isinstance(value, bool) and abs(value) > 1e12:
            raise ConfigError(f"{self.where}: {name!r} is {value!r}; not a believable size")
        return value

    def size(self, name: str, default: Any = MISSING) -> int:
        """A positive integer."""
        value = self.take(name, int, default)
        if value is not default and value < 1:
            raise ConfigError(f"{self.where}: {name!r} is {value}; allowed: at least 1")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses a value other than absent or one of `allowed`: features that the family does not have here."""
        self.seen.add(name)
        value = self.data.get(name)
        if value is not None and value not in allowed:
            raise ConfigError(
                f"{self.where}: {name!r} is {value!r}; supported: {', '.join(map(repr, allowed))} or absent"
            )

    def nested(self, name: str) -> "Fields | None":
        value = self.take(name, dict, None)
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def done(self) -> None:
        """Raises ConfigError naming every field that was neither taken nor harmless."""
        left = sorted(set(self.data) - self.seen - HARMLESS)
        if left:
            shown = ", ".join(f"{name}={self.data[name]!r}"[:80] for name in left)
            raise ConfigError(
                f"{self.where}: fields that optx neither handles nor knows to be harmless: {shown}; "
                "they may change the forward pass, so the model is not loaded"
            )
