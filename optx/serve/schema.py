"""Checks a JSON value against the part of JSON Schema that the server's own OpenAPI document uses.

The same table says what is allowed in the document and to the checker, so that they cannot differ.
"""

import math
import re
from collections.abc import Mapping

from optx.errors import did_you_mean
from optx.serve.faults import Fault

WORDS = {
    "null": "null",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "an object",
}


def check(value: object, schema: Mapping, where: str = "") -> None:
    """Raises Fault (400) that names the place, what it holds and what is allowed."""
    if "anyOf" in schema:
        _check_any(value, schema, where)
        return
    kinds = _kinds(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise _fault(where, show(value), schema)
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        raise _fault(where, show(value), schema)
    if isinstance(value, str):
        _check_text(value, schema, where)
    elif isinstance(value, list):
        _check_list(value, schema, where)
    elif isinstance(value, dict):
        _check_object(value, schema, where)
    elif isinstance(value, int | float) and not isinstance(value, bool) and not _within(value, schema):
        raise _fault(where, show(value), schema)


def allowed(schema: Mapping) -> str:
    """What a schema takes, in words."""
    if "title" in schema:
        return schema["title"]
    if "enum" in schema:
        return ", ".join(map(show, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(map(allowed, schema["anyOf"]))
    words = " or ".join(WORDS[kind] for kind in _kinds(schema)) or "anything"
    low, above, high = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    limits = [] if low is None else [f"at least {low:g}"]
    limits += [] if above is None else [f"above {above:g}"]
    limits += [] if high is None else [f"at most {high:.16g}"]
    limits += ["not empty"] if schema.get("minLength") or schema.get("minItems") else []
    limits += [f"at most {schema['maxItems']} of them"] if "maxItems" in schema else []
    return ", ".join([words, *limits])


def show(value: object) -> str:
    """A value of JSON, short enough for a message."""
    if isinstance(value, dict | list):
        kind = "a list" if isinstance(value, list) else "an object"
        return f"{kind} of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fault(where: str, got: str, schema: Mapping) -> Fault:
    return Fault(400, f"{where or 'body'}: got {got}; allowed: {allowed(schema)}", param=where or None)


def _kinds(schema: Mapping) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _is(value: object, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "integer": number and (isinstance(value, int) or value.is_integer()),
        "number": number and (isinstance(value, int) or math.isfinite(value)),
        "string": isinstance(value, str),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    return fits[kind]


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _within(value: float, schema: Mapping) -> bool:
    return (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and not value <= schema.get("exclusiveMinimum", -math.inf)
        and math.isfinite(value)
    )


def _check_any(value: object, schema: Mapping, where: str) -> None:
    """The only branch of the value's kind speaks for itself; else all of them do."""
    fitting = [branch for branch in schema["anyOf"] if any(_is(value, kind) for kind in _kinds(branch))]
    if not fitting:
        raise _fault(where, show(value), schema)
    for branch in fitting[:-1]:
        try:
            check(value, branch, where)
            return
        except Fault:
            continue
    if len(fitting) == 1:
        check(value, fitting[0], where)
        return
    try:
        check(value, fitting[-1], where)
    except Fault:
        raise _fault(where, show(value), schema) from None


def _check_text(value: str, schema: Mapping, where: str) -> None:
    if len(value) < schema.get("minLength", 0):
        raise _fault(where, "no character", schema)
    if "pattern" in schema and not re.search(schema["pattern"], value):
        raise _fault(where, show(value), schema)


def _check_list(value: list, schema: Mapping, where: str) -> None:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        raise _fault(where, show(value), schema)
    items = schema.get("items")
    if items is None or (items.get("type") == "integer" and _whole_within(value, items)):
        return
    for i, item in enumerate(value):
        check(item, items, f"{where}[{i}]")


def _whole_within(value: list, items: Mapping) -> bool:
    """Whether a list, such as a long prompt, can be taken at once: nothing but ints, none too small or too large."""
    return set(map(type, value)) == {int} and _within(min(value), items) and _within(max(value), items)


def _check_object(value: dict, schema: Mapping, where: str) -> None:
    properties, prefix = schema.get("properties", {}), f"{where}." if where else ""
    if len(value) > schema.get("maxProperties", len(value)):
        raise _fault(where, show(value), schema)
    others = schema.get("additionalProperties", {})
    for name, item in value.items():
        inner = properties.get(name, others)
        if inner is False:
            near = did_you_mean(name, [n for n, s in properties.items() if s is not False])
            raise Fault(400, f"{prefix}{name:.60}: unknown field{near}", param=f"{prefix}{name:.60}")
        if "propertyNames" in schema:
            check(name, schema["propertyNames"], f"{prefix}{name:.60}")
        check(item, inner, f"{prefix}{name:.60}")
    missing = next((name for name in schema.get("required", ()) if name not in value), None)
    if missing is not None:
        raise Fault(400, f"{prefix}{missing}: missing; allowed: {allowed(properties[missing])}", param=prefix + missing)
