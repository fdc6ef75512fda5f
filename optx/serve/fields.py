"""The fields of request bodies, as JSON Schemas: what the protocol reads, what is ignored, what is refused and why.

They follow OpenAI's API reference; the fields that it lacks are vLLM's. Every optional field may be null, which is as if
it were left out.
"""

from collections.abc import Mapping

from optx.compaction import LEAST
from optx.engine.sampling import BIASES, TOP

MOST_ANSWERS = 128  # answers to one prompt
MOST_PROMPTS = 1024  # prompts of one request
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "request_id",
)

TEXT = {"type": "string", "minLength": 1}
FLAG = {"type": "boolean"}
PENALTY = {"type": "number", "minimum": -2, "maximum": 2}

SHARED: Mapping[str, Mapping] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 100, "default": 1.0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1.0},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31 - 1, "description": "0 or -1: off"},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 100},
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "logit_bias": {
        "type": "object",
        "title": f"an object of at most {BIASES} token ids, each with a number from -100 to 100",
        "propertyNames": {"type": "string", "pattern": "^(0|[1-9][0-9]{0,8})$", "title": "a token id in digits"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": BIASES,
    },
    "seed": {
        "type": "integer",
        "minimum": -(2**63),
        "maximum": 2**63 - 1,
        "description": "Equal seeds give equal answers; answer i of n draws with seed + i. Left out: a new one each time",
    },
    "stop": {
        "anyOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": 16}],
        "title": "a text, or a list of up to 16, none empty",
    },
    "stop_token_ids": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "maxItems": 64,
    },
    "ignore_eos": FLAG,
    "n": {"type": "integer", "minimum": 1, "maximum": MOST_ANSWERS, "default": 1},
    "max_tokens": {"type": "integer", "minimum": 1, "description": "No more than the context has room for"},
    "priority": {
        "type": "integer",
        "minimum": -(2**31),
        "maximum": 2**31 - 1,
        "description": "Smaller is served first",
    },
    "stream": FLAG,
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": FLAG, "continuous_usage_stats": FLAG},
        "additionalProperties": False,
    },
    "return_token_ids": FLAG,
    "response_format": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {
                "type": "object",
                "required": ["schema"],
                "properties": {
                    "name": {"type": "string"},
                    "description": {"type": ["string", "null"]},
                    "schema": {"type": "object"},
                    "strict": {"type": ["boolean", "null"]},
                },
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
    },
}
COMPACTION = {
    "title": "true, false, or an object with 'at' (tokens) or 'keep_turns'",
    "description": "Whether old turns are summarised when the prompt passes a threshold. Left out: as the server was started",
}


def completion(model: str, vocab: int) -> Mapping:
    """The body of /v1/completions. model: the name served; vocab: token ids that a prompt may hold."""
    token = {"type": "integer", "minimum": 0, "maximum": vocab - 1, "title": f"a token id, 0 to {vocab - 1}"}
    ids = {"type": "array", "items": token, "minItems": 1}
    prompts = [
        TEXT,
        ids,
        {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MOST_PROMPTS},
        {"type": "array", "items": ids, "minItems": 1, "maxItems": MOST_PROMPTS},
    ]
    title = f"a text, token ids from 0 to {vocab - 1}, or a list of one of the two; none empty"
    own = {
        "prompt": {"anyOf": prompts, "title": title},
        "echo": FLAG,
        "logprobs": {"type": "integer", "minimum": 0, "maximum": TOP},
    }
    refused = {
        "suffix": _only([""], "this server does not fill in the middle"),
        "best_of": _only([1], "this server does not rank answers"),
    }
    return _body(model, own, "prompt", refused)


def chat(model: str, compacts: bool, context: int) -> Mapping:
    """The body of /v1/chat/completions. compacts: whether the server can compact conversations."""
    part = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
        "additionalProperties": False,
    }
    content = {
        "anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": part}],
        "title": "text, or a list of parts of type 'text'",
    }
    history = ("refusal", "annotations", "audio", "function_call", "tool_calls")  # of answers that clients send back
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": content,
            "name": {"type": ["string", "null"]},
            **{name: _only([[]], "this server knows text alone") for name in history},
        },
        "additionalProperties": False,
    }
    variable = {"type": ["boolean", "number", "string"]}
    own = {
        "messages": {"type": "array", "items": message, "minItems": 1},
        "max_completion_tokens": SHARED["max_tokens"],
        "logprobs": FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": TOP},
        "chat_template_kwargs": {
            "type": "object",
            "title": "an object of variables of the chat template, each true or false, a number or text",
            "propertyNames": {
                "type": "string",
                "pattern": "^(?!(messages|tokenizer|tools|add_generation_prompt|self)$)[A-Za-z_][A-Za-z0-9_]*$",
                "title": "the name of a variable that the server does not set itself",
            },
            "additionalProperties": variable,
        },
    }
    tools = "this server does not call tools"
    if compacts:
        own["compaction"] = COMPACTION | {"anyOf": [FLAG, _compaction(context)]}
    refused = {
        **({} if compacts else {"compaction": _only([False], "this server was started without --compact_at")}),
        "tools": _only([[]], tools),
        "tool_choice": _only(["none", "auto"], tools),
        "parallel_tool_calls": _only([True, False], tools),
        "functions": _only([[]], tools),
        "function_call": _only(["none", "auto"], tools),
        "modalities": _only([["text"]], "this server answers in text"),
        "audio": _only([], "this server answers in text"),
        "prediction": _only([], "this server takes no predicted output"),
        "reasoning_effort": _only([], "set what the chat template knows in chat_template_kwargs"),
        "verbosity": _only([], "this server has no such setting"),
        "web_search_options": _only([], "this server does not search"),
    }
    return _body(model, own, "messages", refused)


def _compaction(context: int) -> Mapping:
    properties = {
        "at": {"type": "integer", "minimum": LEAST, "maximum": context - 1},
        "keep_turns": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _body(model: str, own: Mapping, required: str, refused: Mapping) -> Mapping:
    name = {"type": "string", "enum": [model]}
    optional = {**SHARED, **own, "model": name}
    needed = optional.pop(required)
    return {
        "type": "object",
        "required": [required],
        "properties": {
            required: needed,
            **{field: _or_null(schema) for field, schema in optional.items()},
            **refused,
            **{field: {} for field in IGNORED},
        },
        "additionalProperties": False,
    }


def _or_null(schema: Mapping) -> Mapping:
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    enum = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, "type": [schema["type"], "null"], **enum}


def _only(values: list, why: str) -> Mapping:
    """A field that means something only to other servers: nothing but what asks for nothing is let through."""
    return {"enum": [None, *values], "title": f"null, or the field left out: {why}"}
