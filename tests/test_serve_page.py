"""The page, in a real browser."""

import base64
import html.parser
import itertools
import pathlib
import re
import shutil
import subprocess
import time

import httpx2 as httpx
import pytest

from refusion_jax.serving.app import PAGE

pytest_plugins = ["served"]

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--force-color-profile=srgb"),
]


class Browser:
    """Chromium through the WebDriver protocol."""

    def __init__(self, driver: str, folder: pathlib.Path):
        self._process = subprocess.Popen(
            [driver, "--port=0", f"--log-path={folder}/log"], stdout=subprocess.PIPE, text=True
        )
        lines = itertools.takewhile(bool, iter(self._process.stdout.readline, ""))
        port = next(found[1] for found in (re.search(r"successfully on port (\d+)", line) for line in lines) if found)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        arguments = [*FLAGS, f"--user-data-dir={folder}/profile", "--window-size=900,900"]
        options = {"goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")}}
        logging = {"goog:loggingPrefs": {"browser": "ALL"}}
        found = self._call("POST", "/session", {"capabilities": {"alwaysMatch": options | logging}})
        self._session = f"/session/{found['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None):
        found = self._http.request(method, path, json=body).json()["value"]
        assert not (isinstance(found, dict) and "error" in found), found
        return found

    def open(self, address: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": address})

    def run(self, script: str):
        """What a script returns."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def until(self, script: str) -> None:
        """Waits until a script returns true."""
        end = time.monotonic() + 60
        while not self.run(script):
            assert time.monotonic() < end, (script, self.run("return document.body.innerText"), self.log())
            time.sleep(0.05)

    def press(self, keys: str) -> None:
        """Keys as a keyboard sends them to what has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self._call("POST", f"{self._session}/actions", {"actions": [keyboard]})

    def size(self, width: int, height: int) -> None:
        self._call("POST", f"{self._session}/window/rect", {"width": width, "height": height})

    def screenshot(self, path: pathlib.Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def log(self) -> list[str]:
        """What the browser complained about."""
        return [entry["message"] for entry in self._call("POST", f"{self._session}/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._call("DELETE", self._session)
        self._http.close()
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def browser(tmp_path):
    driver = shutil.which("chromedriver")
    if not driver or not shutil.which("chromium"):
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    browser = Browser(driver, tmp_path)
    yield browser
    browser.close()


ENTER, ESCAPE, LEFT = "\ue007", "\ue00c", "\ue012"
IDLE = "return !document.getElementById('send').hidden"
TEXT = "return [...document.querySelectorAll('.answer:last-of-type .text')].at(-1).textContent"


def test_message_is_answered_and_replayed(browser, address, tmp_path):
    browser.open(address)
    browser.until("return document.getElementById('model').textContent === 'tiny'")
    browser.press("sun" + ENTER)
    browser.until(f"return document.querySelector('.answer .token') && ({IDLE[7:]})")
    body = {"messages": [{"role": "user", "content": "sun"}]}
    found = httpx.post(f"{address}/v1/chat/completions", json=body).json()
    assert (
        browser.run("return document.querySelector('.spoken').textContent") == found["choices"][0]["message"]["content"]
    )
    facts = browser.run("return document.querySelector('.facts').textContent")
    usage = found["usage"]
    assert f"{usage['completion_tokens']} tokens" in facts and f"{usage['refusion']['forwards']} forwards" in facts
    assert f"{usage['refusion']['rounds']} rounds" in facts and "tokens/s" in facts
    rounds = usage["refusion"]["rounds"]
    tokens = "return document.querySelectorAll('.token').length"
    hues = "return new Set([...document.querySelectorAll('.token')].map((x) => x.style.getPropertyValue('--hue'))).size"
    assert browser.run(hues) == rounds  # a colour of its own for every round

    whole = browser.run(tokens)
    browser.run("document.querySelector('.round').focus()")
    browser.press(LEFT)
    assert browser.run("return document.querySelector('output').textContent") == f"round {rounds - 1} of {rounds}"
    assert browser.run(tokens) < whole
    browser.run("document.querySelector('.play').click()")
    browser.until(f"return document.querySelectorAll('.token').length === {whole}")
    browser.screenshot(tmp_path / "answer.png")
    assert not [line for line in browser.log() if "SEVERE" in line or "Refused" in line]


def test_settings_conversation_and_phone(browser, address, tmp_path):
    browser.size(390, 844)
    browser.open(address)
    browser.until("return document.getElementById('model').textContent === 'tiny'")
    browser.run("document.getElementById('settings').open = true")
    browser.run(
        "const method = document.getElementById('method'); method.value = 'autoregressive';"
        "method.dispatchEvent(new Event('change')); document.getElementById('message').focus()"
    )
    for message in ("sun", "moon"):
        browser.press(message + ENTER)
        browser.until(f"return document.querySelectorAll('.answer .replay:not([hidden])').length && ({IDLE[7:]})")
    browser.until("return document.querySelectorAll('.answer .replay:not([hidden])').length === 2")
    assert browser.run("return conversation.map((message) => message.role).join()") == "user,assistant,user,assistant"
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    before = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") != before
    browser.screenshot(tmp_path / "phone.png")
    browser.run("document.querySelector('a[href=\"/page/api.html\"]').click()")
    browser.until("return document.title === 'The API'")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.screenshot(tmp_path / "api.png")


def test_what_is_drawn_is_the_answer(browser, address):
    """Nothing that was written behind its end, and as long as there is room for unless the settings say less."""
    browser.open(address)
    browser.until("return document.getElementById('model').textContent === 'tiny'")
    for message, limit in (("sun", "3"), ("moon and stars", "5"), ("x" * 182, "")):
        browser.run(f"document.getElementById('max_tokens').value = '{limit}'")
        browser.run("document.getElementById('new').click()")
        browser.press(message + ENTER)
        browser.until(f"return document.querySelector('.answer .replay:not([hidden])') && ({IDLE[7:]})")
        drawn = browser.run("return document.querySelectorAll('.token').length")
        assert browser.run("return document.querySelector('.facts').textContent").startswith(f"{drawn} tokens")
        assert 1 <= drawn <= int(limit or 192) and not browser.run("return document.querySelector('.open, .error')")


HALF = """
const slot = { index: 0, round: 0, positions: [...Array(1000).keys()], texts: Array(1000).fill("x") };
const chunk = { choices: [{ delta: { content: "half" } }], refusion: { slots: [slot] } };
window.fetch = async (_, { signal }) => new Response(new ReadableStream({ start(stream) {
  stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\n\n`));
  signal.addEventListener("abort", () => stream.error(new DOMException("stopped", "AbortError")));
} }));
"""


def test_stopped_and_forgotten_answers(browser, address):
    """Half of an answer is kept when it is stopped, with the rate that it had, and forgotten with its conversation."""
    browser.open(address)
    browser.until("return document.getElementById('model').textContent === 'tiny'")
    browser.run(HALF)  # of an answer that does not end
    browser.press("sun" + ENTER)
    browser.until("return document.querySelectorAll('.token').length === 1000")
    browser.press(ESCAPE)
    browser.until(IDLE)
    assert browser.run("return conversation.map((message) => message.content).join()") == "sun,half"
    facts = browser.run("return document.querySelector('.facts').textContent")
    browser.run("document.querySelector('.round').focus()")
    browser.press(LEFT)
    assert browser.run("return document.querySelectorAll('.token').length") == 0
    assert browser.run("return document.querySelector('.facts').textContent") == facts
    browser.run("document.getElementById('message').focus()")
    browser.press("moon" + ENTER)
    browser.until("return document.querySelectorAll('.token').length === 1000")
    browser.run("document.getElementById('new').click()")
    browser.until(IDLE)
    assert browser.run("return conversation.length") == 0


def test_page_is_whole_without_other_servers():
    """Every file that a page names is the server's own, and there."""

    class Names(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            named.extend(value for name, value in attributes if name in ("src", "href"))

    for file in PAGE.glob("*.html"):
        named: list[str] = []
        Names().feed(file.read_text())
        for name in named:
            assert name in ("/", "data:,") or (PAGE / name.removeprefix("/page/")).is_file(), name
    for file in PAGE.iterdir():
        addresses = set(re.findall(r"https?://[^\s/'\"<]+", file.read_text()))
        assert addresses <= {"http://127.0.0.1:8000"}, addresses


def test_no_other_file_is_served(http_client):
    assert http_client.get("/").text.startswith("<!doctype html>")
    for name in ("..%2fapp.py", "%2e%2e/app.py", "app.py", "index.html%00.js", "../../serve.py", "nothing.html"):
        assert http_client.get(f"/page/{name}").status_code == 404
