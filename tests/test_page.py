"""The server's page in a headless Chromium: chat, figures, the key, errors."""

import json
import os
import signal

import browser
import pytest
import tiny

from optx.bench.soak import serving

PATH = browser.find()
pytestmark = pytest.mark.skipif(PATH is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is on the PATH")
CODE = "document.getElementById('{}')"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Without an end token: an answer lasts until it is stopped."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("page") / "tiny", max_position_embeddings=2048)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"eos_token": None}))
    return str(folder)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, "--rows", "2", "--context", "2048") as found:
        yield found


@pytest.fixture
def tab(server):
    tab = browser.Browser(PATH)
    try:
        tab.open(server.url)
        tab.wait(text("health") + " === 'serving'")
        yield tab
        assert tab.complaints == []
    finally:
        tab.close()


def text(id: str) -> str:
    return f"{CODE.format(id)}.textContent"


def fill(tab, id: str, value) -> None:
    tab.evaluate(f"{CODE.format(id)}.value = {value!r}")


def send(tab, message: str, tokens: int = 40) -> None:
    fill(tab, "temperature", "0")
    fill(tab, "max_tokens", tokens)
    tab.evaluate(f"{CODE.format('prompt')}.focus()")
    tab.type(message)
    tab.press("Enter", 13)


LAST = "[...document.querySelectorAll('article.assistant')].at(-1)"


def test_an_answer_streams_in_and_the_figures_follow(tab):
    assert tab.evaluate(text("model")) == "tiny" and tab.evaluate("document.title") == "tiny · optx"
    before = int(tab.evaluate(text("generated")).replace(",", ""))
    tab.evaluate(
        f"window.lengths = new Set(); new MutationObserver(() => lengths.add({LAST}?.querySelector('.text').textContent.length))"
        ".observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true})"
    )
    send(tab, "The quick brown fox")
    tab.wait(f"{LAST}?.querySelector('.meta')")
    assert "40 tokens, first after" in tab.evaluate(f"{LAST}.querySelector('.meta').textContent")
    assert tab.evaluate("lengths.size") > 5, "the text came in pieces"
    assert tab.evaluate("document.querySelector('article.user').textContent") == "The quick brown fox"
    tab.wait(f"Number({text('generated')}.replace(',', '')) >= {before + 40}")
    tab.wait(
        "document.querySelector('#ttft td').textContent !== '–' && document.querySelector('#tpot td').textContent !== '–'"
    )
    pages = [int(tab.evaluate(text(f"pages_{kind}"))) for kind in ("used", "cached", "free")]
    assert sum(pages) > 0 and "used" in tab.evaluate("document.getElementById('pool').getAttribute('aria-label')")
    assert tab.evaluate("document.querySelector('#spark .line').getAttribute('d').includes('L')")
    send(tab, "jumps over", 5)
    tab.wait("document.querySelectorAll('article.assistant .meta').length === 2")
    tab.wait("document.getElementById('prefix').textContent.endsWith('%')")


def test_stop_and_new_chat(tab):
    # The page itself clicks at the first piece of text: seen from here the whole answer may come between two looks.
    tab.evaluate(
        "window.answering = null; new MutationObserver(() => {"
        f"if (answering !== null || !{LAST}?.querySelector('.text').textContent.length) return;"
        "answering = document.getElementById('send').hidden && !document.getElementById('stop').hidden;"
        "document.getElementById('stop').click();"
        "}).observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true})"
    )
    send(tab, "Pack my box", 1900)
    tab.wait("answering !== null")
    assert tab.evaluate("answering")
    tab.wait(
        f"{LAST}.querySelector('.meta')?.textContent.includes('stopped') && !document.getElementById('send').hidden"
    )
    tab.wait(f"{text('running')} === '0'")
    tab.evaluate(f"{CODE.format('clear')}.click()")
    assert tab.evaluate("document.querySelectorAll('article').length") == 0
    assert tab.evaluate("!document.getElementById('empty').hidden && document.activeElement.id === 'prompt'")


def test_what_the_server_refuses_is_told_and_can_be_tried_again(tab):
    send(tab, "fox " * 3000)
    tab.wait("document.querySelector('[role=alert]')?.textContent.includes('context is 2048')")
    tab.evaluate("document.querySelector('[role=alert] button').click()")
    tab.wait("document.querySelector('[role=alert]')?.textContent.includes('context is 2048')")
    tab.evaluate(f"{CODE.format('clear')}.click()")
    send(tab, "fox", 3)
    tab.wait(f"{LAST}?.querySelector('.meta') && !document.querySelector('[role=alert]')")


def test_the_page_fits_a_narrow_screen_and_names_its_controls(tab):
    tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    nameless = (
        "[...document.querySelectorAll('button, input, textarea')]"
        ".filter((e) => !e.textContent.trim() && !e.labels?.length).map((e) => e.id)"
    )
    assert tab.evaluate(nameless) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(tab, scheme):
    """Contrast of at least 4.5 (WCAG 2.2, success criterion 1.4.3) for every pair of text and ground."""
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    names = "['ground', 'card', 'ink', 'faint', 'mine', 'bad', 'bad-ground', 'accent', 'on-accent']"
    style = "getComputedStyle(document.documentElement)"
    colors = tab.evaluate(f"Object.fromEntries({names}.map((n) => [n, {style}.getPropertyValue('--' + n).trim()]))")

    def light(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    pairs = [(ink, ground) for ink in ("ink", "faint", "bad") for ground in ("ground", "card")]
    for ink, ground in [*pairs, ("ink", "mine"), ("bad", "bad-ground"), ("on-accent", "accent")]:
        low, high = sorted((light(colors[ink]), light(colors[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{ink} {colors[ink]} on {ground} {colors[ground]}"


def test_quantiles_of_a_histogram(tab):
    """As Prometheus's histogram_quantile: even within a bucket, the last finite bound beyond it."""
    tab.evaluate("import('/page.js').then((page) => { window.page = page; })")
    rows = "[[0.1, 10], [0.2, 30], [Infinity, 40]]"
    assert tab.evaluate(f"[0.25, 0.5, 0.99].map((q) => page.quantile({rows}, q))") == pytest.approx([0.1, 0.15, 0.2])
    assert tab.evaluate("page.quantile([[0.1, 0], [Infinity, 0]], 0.5)") is None
    metrics = 'page.parseMetrics(`# HELP a b\\na_bucket{le="+Inf",x="y"} 3\\nb 1e3\\n`)'
    assert tab.evaluate(f"[...{metrics}]") == [
        ["a_bucket", [{"labels": {"le": "+Inf", "x": "y"}, "value": 3}]],
        ["b", [{"labels": {}, "value": 1000}]],
    ]


def test_the_key_is_asked_for_and_a_stopped_server_is_told(model):
    with serving(model, "--rows", "2", "--context", "64", "--api_key", "sesame") as server:
        tab = browser.Browser(PATH)
        try:
            tab.open(server.url)
            tab.wait("document.getElementById('key_dialog').open")
            for key, after in (("wrong", "document.getElementById('key_note').textContent.includes('refused')"),
                               ("sesame", text("health") + " === 'serving'")):  # fmt: skip
                fill(tab, "key", key)
                tab.evaluate("document.querySelector('#key_form .main').click()")
                tab.wait(after)
            send(tab, "fox", 3)
            tab.wait(f"{LAST}?.querySelector('.meta')")
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            tab.wait(text("health") + " === 'unreachable' && !document.getElementById('figures_note').hidden")
            send(tab, "fox", 3)
            tab.wait("document.querySelector('[role=alert]')?.textContent.includes('cannot be reached')")
            assert tab.complaints == []
        finally:
            tab.close()
