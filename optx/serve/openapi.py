"""The OpenAPI document: request bodies are the schemas that bodies are checked against."""

from collections.abc import Mapping

from optx.serve.protocol import Protocol

NUMBER, WHOLE, WORD = {"type": "number"}, {"type": "integer", "minimum": 0}, {"type": "string"}
ERRORS = {
    "400": "The body is wrong; the message names the field, what it holds and what is allowed",
    "401": "The API key is missing or wrong",
    "404": "The model is not served here",
    "405": "Wrong method",
    "413": "The body is too large",
    "415": "The body is not of type application/json",
    "429": "The queue is full; Retry-After says when to ask again",
    "500": "The engine failed while it computed the answer",
    "503": "The server is shutting down, or its engine has stopped",
    "504": "The answer took longer than the server allows",
}


def document(protocol: Protocol, keyed: bool, version: str) -> Mapping:
    """OpenAPI 3.1. keyed: whether requests need the API key."""
    completions = _post("Continue a prompt", "CompletionRequest", "Completion", keyed)
    chat = _post("Answer a conversation", "ChatRequest", "ChatCompletion", keyed)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    text = {"text/plain": {"schema": WORD}}
    paths = {
        "/v1/completions": {"post": completions},
        "/v1/chat/completions": {"post": chat},
        "/v1/models": {"get": _get("The model served", _json("Models"), keyed)},
        "/v1/models/{name}": {"get": {**_get("One model", _json("Model"), keyed, "404"), "parameters": [name]}},
        "/health": {"get": _get("Whether requests are being served", _json("Health"), False, "503", "Health")},
        "/metrics": {"get": _get("Figures for Prometheus", text, keyed)},
        "/openapi.json": {"get": _get("This document", {"application/json": {"schema": {"type": "object"}}}, False)},
    }
    key = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keyed else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"optx serve: {protocol.model}", "version": version},
        "paths": paths,
        "components": {"schemas": {**_requests(protocol), **_responses()}, **key},
    }


def _requests(protocol: Protocol) -> dict:
    return {"CompletionRequest": protocol.completion_schema, "ChatRequest": protocol.chat_schema}


def _responses() -> dict:
    finish = {"enum": ["stop", "length"]}
    usage = _object(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
    head = {"id": WORD, "created": WHOLE, "model": WORD, "usage": usage}
    end = {"index": WHOLE, "logprobs": {"type": ["object", "null"]}, "finish_reason": finish}
    message = _object(role={"enum": ["assistant"]}, content=WORD, refusal={"type": "null"})
    model = _object(id=WORD, object={"enum": ["model"]}, created=WHOLE, owned_by=WORD, max_model_len=WHOLE)
    or_null = {"type": ["string", "null"]}
    return {
        "Completion": _object(object={"enum": ["text_completion"]}, choices=_list(_object(text=WORD, **end)), **head),
        "ChatCompletion": _with(
            _object(object={"enum": ["chat.completion"]}, choices=_list(_object(message=message, **end)), **head),
            compaction={"$ref": "#/components/schemas/Compaction"},
        ),
        "Compaction": _object(
            messages_before=WHOLE,
            messages_after=WHOLE,
            tokens_before=WHOLE,
            tokens_after=WHOLE,
            summary=WORD,
            summary_tokens=WHOLE,
            reused={"type": "boolean"},
            failed=or_null,
        ),
        "Model": model,
        "Models": _object(object={"enum": ["list"]}, data=_list(model)),
        "Health": {"type": "object", "required": ["status"], "properties": {"status": WORD, "reason": WORD}},
        "Error": _object(error=_object(message=WORD, type=WORD, param=or_null, code=or_null)),
    }


def _object(**properties: Mapping) -> Mapping:
    return {"type": "object", "required": list(properties), "properties": properties}


def _with(schema: Mapping, **optional: Mapping) -> Mapping:
    return {**schema, "properties": {**schema["properties"], **optional}}


def _list(items: Mapping) -> Mapping:
    return {"type": "array", "items": items}


def _json(name: str) -> Mapping:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _error(status: str, name: str = "Error") -> Mapping:
    return {"description": ERRORS[status], "content": _json(name)}


def _get(summary: str, content: Mapping, keyed: bool, error: str | None = None, form: str = "Error") -> dict:
    responses = {"200": {"description": summary, "content": content}, "405": _error("405")}
    responses |= {error: _error(error, form)} if error else {}
    return {"summary": summary, "responses": responses | ({"401": _error("401")} if keyed else {}), **_locked(keyed)}


def _post(summary: str, request: str, response: str, keyed: bool) -> dict:
    whole = {"description": summary, "content": {**_json(response), "text/event-stream": {"schema": WORD}}}
    errors = {status: _error(status) for status in ERRORS if status != "401" or keyed}
    body = {"required": True, "content": _json(request)}
    return {"summary": summary, "requestBody": body, "responses": {"200": whole, **errors}, **_locked(keyed)}


def _locked(keyed: bool) -> dict:
    return {"security": [{"key": []}]} if keyed else {}
