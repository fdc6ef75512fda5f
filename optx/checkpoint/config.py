"""Strict reading of foreign configs: a field neither handled nor known to be harmless is an error that names it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from optx.errors import ConfigError

# Say nothing about the forward pass, in any family.
HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "use_return_dict",
    }
)
MISSING: Any = object()
MAX_LAYERS = 4096


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
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind in (int, float)):
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError(f"{self.where}: {name!r} is {value!r}; allowed: {kinds}")
        if kind in (int, float) and not abs(value) <= 1e12:  # NaN is not, either
            raise ConfigError(f"{self.where}: {name!r} is {value!r:.40}; not a believable size")
        return float(value) if kind is float else value

    def size(self, name: str, default: Any = MISSING, most: int = 10**12) -> int:
        """A positive integer, at most `most`."""
        value = self.take(name, int, default)
        if value is not default and not 1 <= value <= most:
            raise ConfigError(f"{self.where}: {name!r} is {value}; allowed: 1 to {most}")
        return value

    def layers(self, name: str = "num_hidden_layers") -> int:
        """How many blocks: bounded, because each is built before its weights are looked for."""
        return self.size(name, most=MAX_LAYERS)

    def positive(self, name: str, default: Any = MISSING) -> float:
        """A number above 0."""
        value = self.take(name, float, default)
        if value is not default and not value > 0:
            raise ConfigError(f"{self.where}: {name!r} is {value}; allowed: above 0")
        return value

    def names(self, name: str, count: int, allowed: tuple[str, ...]) -> list[str] | None:
        """A list of `count` names, each one of `allowed`; None where it is absent."""
        values = self.take(name, list, None)
        if values is None:
            return None
        if len(values) != count:
            raise ConfigError(f"{self.where}: {name!r} has {len(values)} entries for {count} layers")
        wrong = [value for value in values if value not in allowed]
        if wrong:
            raise ConfigError(f"{self.where}: {name!r} holds {wrong[0]!r}; supported: {', '.join(allowed)}")
        return values

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
