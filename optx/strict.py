"""Plain mappings (YAML, JSON) into frozen dataclasses and back, with errors that name the key."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from optx.errors import RecipeError, did_you_mean


def load[T](cls: type[T], data: Any, where: str) -> T:
    """`data` as an instance of the dataclass `cls`.

    Raises: RecipeError naming `where.key`, what was got and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: got {type(data).__name__}; allowed: a mapping with the fields of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            raise RecipeError(f"{where}.{key}: unknown field of {cls.__name__}{did_you_mean(str(key), fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{where}: missing field {missing[0]!r} of {cls.__name__}")
    hints = _hints(cls)
    return cls(**{key: convert(value, hints[key], f"{where}.{key}") for key, value in data.items()})


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    return typing.get_type_hints(cls)


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` checked against a type hint: scalars, None, Literal, unions, tuples and nested dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _union(value, args, where)
    if origin is typing.Literal:
        if value not in args:
            raise RecipeError(f"{where}: got {value!r}{did_you_mean(str(value), [str(a) for a in args])}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where}: got {value!r}; allowed: a list")
        return tuple(convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return load(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (
        not isinstance(value, hint) or (hint is not bool and isinstance(value, bool))
    ):
        raise RecipeError(f"{where}: got {value!r} ({type(value).__name__}); allowed: {hint.__name__}")
    if hint is type(None) and value is not None:
        raise RecipeError(f"{where}: got {value!r}; allowed: null")
    return value


def _union(value, args, where):
    if value is None and type(None) in args:
        return None
    options = [a for a in args if a is not type(None)]
    errors = []
    for option in options:
        try:
            return convert(value, option, where)
        except RecipeError as error:
            errors.append(error)
    raise errors[0]


def dump(obj: Any) -> Any:
    """A dataclass as plain mappings and lists, without the fields that stand at their default."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {
            f.name: dump(getattr(obj, f.name))
            for f in dataclasses.fields(obj)
            if f.init and getattr(obj, f.name) != _default(f)
        }
    if isinstance(obj, list | tuple):
        return [dump(item) for item in obj]
    return obj


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


class UniqueKeys(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A safe loader that refuses a key written twice, of which YAML would silently keep the second."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
