"""Reports in a real browser: nothing is missing, nothing overflows, nothing runs, in both colour schemes and on paper.

The browser is driven through the DevTools protocol on two pipes (https://chromedevtools.github.io/devtools-protocol: JSON objects, each
ended by a zero byte; file descriptor 3 is read, 4 written), so that the standard library is enough.
"""

import fcntl
import json
import os
import select
import shutil
import signal

import pytest

from llmrec.cli import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-extensions --disable-background-networking --no-first-run"
)
PATIENCE = 60.0  # seconds for an answer: the machine may be busy
WIDTHS = (390, 1280)
HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    '"><svg onload="document.title = \'owned\'"></svg>',
    "</td></table></details></body></html>",
    "javascript:document.title='owned'",
    "data:text/html,<script>document.title='owned'</script>",
    "\u202egnihton \u2066evil\u2069",
    "https://evil.example/" + "x" * 300,
    "{{ 7 * 7 }} $\\\\frac{1}{0}$ %s &amp;",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: install Debian's package to look at reports in a browser")


class Browser:
    """A browser process with one tab; a context manager that ends it.

    Attributes:
        messages: what console, scripts and the browser's log said since the last `open`.
        requests: addresses asked for since then.
    """

    def __init__(self, profile):
        reads, self.writing = _pipe()
        self.reading, writes = _pipe()
        pipes = [(os.POSIX_SPAWN_DUP2, reads, 3), (os.POSIX_SPAWN_DUP2, writes, 4)]
        silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        arguments = [CHROMIUM, *FLAGS.split(), "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = os.posix_spawn(arguments[0], arguments, os.environ, file_actions=pipes + silent, setpgroup=0)
        os.close(reads)
        os.close(writes)
        self.received, self.number, self.session = b"", 0, None
        self.messages, self.requests, self.loaded = [], [], False
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.reading)
        os.close(self.writing)

    def open(self, path, width, height=900, scheme="light", media="screen"):
        """Show a file at a width, in a colour scheme, on screen or paper; returns when it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.messages, self.requests, self.loaded = [], [], False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._take()

    def value(self, expression):
        """What a JavaScript expression gives on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def call(self, method, **parameters):
        """Send a command and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while (answer := self._take()).get("id") != self.number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _take(self):
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.reading], [], [], PATIENCE)
            part = os.read(self.reading, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self.received += part
        line, _, self.received = self.received.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params"))
        return message

    def _note(self, method, event):
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(event)


def _pipe():
    """A pipe whose ends are not 3 or 4, which the browser's get."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def pages(evaluated, finished, tmp_path_factory):
    """The report of a tame run, that of one with hostile titles, and one page about both."""
    root = tmp_path_factory.mktemp("pages")
    titles = [HOSTILE[n] if n < len(HOSTILE) else f"Film number {n} (1999)" for n in range(30)]
    name = "\"><script>document.title='owned'<!-- $x$"
    folder = evaluated(titles, name, "$<b>y$", root, reported=False)
    assert main(["report", str(folder), "--out", str(root / "hostile.html")]) == 0
    assert main(["report", str(finished), str(folder), "--out", str(root / "both.html")]) == 0
    return {"tame": finished / "report.html", "hostile": root / "hostile.html", "both": root / "both.html"}


# Elements that stick out to the right or left, other than inside what may be scrolled, and words that leave their picture.
STICKING_OUT = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && !e.parentElement.closest('.scroll') && e.checkVisibility())
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
  .concat([...document.querySelectorAll('svg text')].filter(e => {
    const box = e.getBoundingClientRect(), picture = e.closest('svg').getBoundingClientRect()
    return box.left < picture.left - 2 || box.right > picture.right + 2 || box.top < picture.top - 2 || box.bottom > picture.bottom + 2
  })).map(e => e.tagName + ': ' + e.textContent.slice(0, 60))
"""
# Pictures without size, in-page ways that lead nowhere, headings with nothing below them, ids that are there twice.
MISSING = """
[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().height < 100 || !e.querySelector('path')).map(e => 'a picture')
  .concat([...document.querySelectorAll('a[href^="#"]')].filter(a => !document.querySelector(a.getAttribute('href'))).map(a => a.href))
  .concat([...document.querySelectorAll('h2')].filter(h => (h.nextElementSibling?.tagName ?? 'H2') == 'H2').map(h => h.textContent))
  .concat([...document.querySelectorAll('[id]')].map(e => e.id).filter((id, at, all) => all.indexOf(id) != at))
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["tame", "hostile", "both"])
def test_all_is_there_and_nothing_sticks_out(browser, pages, name, width, scheme):
    browser.open(pages[name], width, scheme=scheme)
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(STICKING_OUT) == []
    assert browser.value(MISSING) == []
    assert browser.value("document.querySelectorAll('svg').length") >= 5
    assert browser.messages == []
    assert browser.requests == [pages[name].resolve().as_uri()]


@pytest.mark.parametrize("name", ["hostile", "both"])
def test_nothing_runs_and_titles_are_text(browser, pages, name):
    browser.open(pages[name], 1280)
    assert "owned" not in browser.value("document.title").partition(":")[0]
    assert browser.value("document.scripts.length + document.images.length") == 0
    assert (
        browser.value("[...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length") == 0
    )
    assert browser.value("[...document.links].filter(a => a.protocol != 'file:').length") == 0
    if name == "hostile":
        shown = browser.value("document.body.textContent")
        for title in HOSTILE:
            assert "".join(c if c.isprintable() else " " for c in title) in shown, title


def test_the_colour_scheme_is_followed_and_words_stand_out(browser, pages):
    luminance = """(colour => {
        const [r, g, b] = colour.match(/[0-9.]+/g).map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    })"""
    style = "getComputedStyle(document.querySelector('{}')).{}"
    for scheme, dark in (("light", False), ("dark", True)):
        browser.open(pages["tame"], 390, scheme=scheme)
        back = browser.value(luminance + f"({style.format('body', 'backgroundColor')})")
        assert (back < 0.1) == dark
        for words in ("p", ".dim", "svg text", ".verdict"):  # WCAG 2.2, 1.4.3: a contrast of 4.5 to 1
            one = browser.value(luminance + f"({style.format(words, 'fill' if 'svg' in words else 'color')})")
            assert (max(one, back) + 0.05) / (min(one, back) + 0.05) >= 4.5, (scheme, words)
        for line in range(7):  # 1.4.11: 3 to 1 for graphics would rule out Okabe and Ito's yellow; 1.6 tells it from the page
            browser.value(f"document.querySelector('h1').style.color = 'var(--c{line})'")
            one = browser.value(luminance + f"({style.format('h1', 'color')})")
            assert (max(one, back) + 0.05) / (min(one, back) + 0.05) >= 1.6, (scheme, line)


def test_on_paper_it_is_black_on_white_and_unfolded(browser, pages):
    browser.open(pages["tame"], 1280, scheme="dark", media="print")
    assert browser.value("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("[...document.querySelectorAll('details table')].every(e => e.getBoundingClientRect().height > 0)")
