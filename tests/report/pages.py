"""What is reported on in tests, and a page that tells what it did."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage

from emformer.observables import Row
from emformer.recordings import Recordings

HOSTILE = (
    "<script>hacked=1</script>",
    "</script><script>hacked=1</script>",
    "<img src=x onerror=hacked=1>",
    "\"'><svg onload=hacked=1>",
    "\u202egnp.exe",
    "\x00nul",
    "&lt;b&gt;",
    "$x^2$",
    "%{x}",
    "שלום",
    "<b>bold</b>",
    " two\nlines",
    "<!--",
    "<a href='javascript:hacked=1'>a</a>",
    "</style><style>*{display:none}",
    "\u2028\u2069",
)
STATES = ((0, "embed"), (0, "attn"), (0, "ffn"), (1, "attn"), (1, "ffn"))
STEPS = (0, 1, 10, 100)


def rows(step: int, shift: float = 0.0) -> Iterator[Row]:
    """Records of one step; values tell where they stand."""
    for k, (layer, point) in enumerate(STATES):
        value = step + 10 * k + shift
        for cloud in ("raw", "read"):
            if point != "embed" or cloud == "raw":
                yield Row(layer, point, "geo.id_twonn", 2 + 0.1 * k + 0.01 * step + shift, None, 0.1, 256, cloud=cloud)
        if point != "embed":
            yield Row(layer, point, "flow.speed_rel", value, 1.0, 0.125, 64)
            yield Row(layer, point, "flow.w2", 2 * value, 1.0, 0.125, 64, null=1.0, null_sd=0.1)
        if point == "attn":
            yield Row(layer, point, "breath.b_attn", 0.1 * value, None, 0.05, 256, null=0.0)
            yield Row(layer, point, "attn.sink_rate", 0.5, 0.1, 0.0125, 64, head=1)
    yield Row(None, None, "breath.sawtooth", 0.75, n_valid=4, null=0.25)
    yield Row(0, "attn", "<img src=x onerror=hacked=1>", 1.0, 1.0, 0.5, 4, param="</script><b>")


def recorded(folder: Path, shift: float = 0.0) -> Path:
    folder.mkdir()
    writer = Recordings(folder / "records.jsonl", -1)
    for step in STEPS:
        writer.append(step, rows(step, shift))
    writer.close()
    return folder


def _advice(message: ConsoleMessage) -> bool:
    """Whether the browser only tells how its software rendering of 3-D could be faster."""
    return message.type == "warning" and any(name in message.text for name in ("Canvas2D:", "GL Driver Message"))


class Opened:
    """A page in the browser, and all that it said, asked for and did meanwhile."""

    def __init__(self, browser: Browser, path: Path, width: int = 1180, **context: Any):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **context)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: None if _advice(message) else self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.address = path.as_uri()

    def all_drawn(self) -> list[str]:
        """Come near every figure, and return their names once they are drawn."""
        names = self.page.eval_on_selector_all("figure[data-figure]", "all => all.map(one => one.dataset.figure)")
        for name in names:
            self.page.locator(f"#{name}").scroll_into_view_if_needed()
            self.page.wait_for_selector(f"figure[data-figure={name}][data-drawn]", state="attached")
        return names

    def near(self, name: str) -> None:
        self.page.locator(f"#{name}").scroll_into_view_if_needed()
        self.page.wait_for_selector(f"figure[data-figure={name}][data-drawn]", state="attached")

    def until(self, condition: str, seconds: float = 10.0) -> None:
        """Wait for an expression to be true. (The browser's own waiting evaluates text, which the page's policy forbids.)"""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}"
            self.page.wait_for_timeout(50)

    def drawn(self, plot: str, what: str, trace: int = 0) -> Any:
        """What plotly holds of a trace, as numbers: `what` is its field."""
        field = f"document.getElementById('{plot}')._fullData[{trace}].{what}"  # data itself may hold arrays as base64
        return json.loads(self.page.evaluate(f"JSON.stringify(Array.from({field}))"))

    def slide(self, figure: str, name: str, index: int) -> None:
        """Move a slider as a reader does."""
        self.page.locator(f"#{figure} input[name='{name}']").evaluate(
            "(input, index) => { input.value = index; input.dispatchEvent(new Event('input', {bubbles: true})); }", index
        )

    def choose(self, figure: str, name: str, value: str) -> None:
        self.page.locator(f"#{figure} select[name='{name}']").select_option(value)
