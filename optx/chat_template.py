"""Chat templates: Jinja programs that checkpoints carry, run in a sandbox with what transformers gives them."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from optx.errors import CheckpointError, RequestError


def render(template: str, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]) -> str:
    """The prompt that a template makes of a conversation.

    Variables are what templates read besides `messages`: `add_generation_prompt`, `tools`, `bos_token`, ...
    Raises CheckpointError for a template that does not parse, RequestError for messages that are malformed or that
    the template refuses.
    """
    _check(messages)
    compiled = _compile(template)
    try:
        return compiled.render(messages=messages, **variables)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise RequestError(f"messages: the model's chat template refuses them: {error}") from error


def _check(messages: Sequence[Mapping[str, object]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages: got {type(messages).__name__}, allowed: a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            got = type(message).__name__
            raise RequestError(f"messages[{index}]: got {got}, allowed: an object with 'role' and 'content'")
        if not isinstance(message.get("role"), str):
            got = repr(message.get("role"))
            raise RequestError(f"messages[{index}].role: got {got}, allowed: 'system', 'user', 'assistant', ...")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            got = type(content).__name__
            raise RequestError(f"messages[{index}].content: got {got}, allowed: text, or a list of parts")


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"chat template, line {error.lineno}: {error.message}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's turns for training masks; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
