"""Chat templates: what transformers gives them, and what a sandbox and bad messages get."""

import pytest
import vocabularies

from optx.chat_template import render
from optx.errors import CheckpointError, RequestError
from optx.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]

TEMPLATES = {
    "{{ tools | tojson }}": '[{"é": "<&>"}]',
    "{{ bos_token is defined }}|{{ eos_token }}": "False|<|end|>",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}": "hi",
    "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}": "01",
    "{{ strftime_now('%Y') | length }}": "4",
    "{{ mode }}": "fast",
    "  {% if true %}\nx\n  {% endif %}\ny": "x\ny",
}

BAD_CHATS = {
    "refused": ("{{ raise_exception('roles must alternate') }}", HI, "must alternate"),
    "sandbox": ("{{ messages.__class__.__mro__ }}", HI, "unsafe"),
    "immutable": ("{{ messages.append(1) }}", HI, "'append' of 'list' object is unsafe"),
    "loop": ("{% for i in range(10**9) %}{% endfor %}", HI, "Range too big"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", HI, "recursion"),
    "content": ("{{ 'a' + messages[0].content }}", [{"role": "u", "content": None}], "refuses them"),
    "empty": ("x", [], "messages: got list"),
    "text": ("x", "hi", "messages: got str"),
    "message": ("x", ["hi"], r"messages\[0\]: got str"),
    "role": ("x", [{"content": "x"}], r"messages\[0\].role: got None"),
    "number": ("x", [{"role": "u", "content": 3}], r"messages\[0\].content: got int"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_templates_expect(template):
    given = {"tools": [{"é": "<&>"}], "mode": "fast", "eos_token": "<|end|>"}
    assert render(template, HI, given) == TEMPLATES[template]


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_chats_are_refused(case):
    template, messages, message = BAD_CHATS[case]
    with pytest.raises(RequestError, match=message):
        render(template, messages, {})


def test_a_template_that_does_not_parse_is_the_checkpoints_fault():
    with pytest.raises(CheckpointError, match="chat template, line 2"):
        render("a\n{% if %}", HI, {})


def test_a_tokenizers_chat():
    metadata = vocabularies.byte_level()
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.chat(HI) == "user: hi<|end|>assistant: "
    assert tokenizer.chat(HI, add_generation_prompt=False) == "user: hi"
    ids = tokenizer.encode(tokenizer.chat(HI), add_special=False, parse_special=True)
    assert ids.count(metadata["tokenizer.ggml.eos_token_id"]) == 1
    shouting = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": "{{ eos_token if loud }}{{ tools }}"})
    assert shouting.chat(HI, loud=True, tools=["t"]) == "<|end|>['t']"


def test_without_a_template():
    metadata = {key: value for key, value in vocabularies.byte_level().items() if key != "tokenizer.chat_template"}
    with pytest.raises(RequestError, match="no chat template; send a plain prompt"):
        Tokenizer.from_gguf(metadata).chat(HI)
