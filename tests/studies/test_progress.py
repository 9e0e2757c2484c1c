"""What is told while an analysis goes on, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from emformer.studies import progress


def test_without_a_terminal_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter([100.0, 110.0, 131.0, 140.0, 170.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.telling("step", 10_000, start=1_000) as tell:
        for count in (1_500, 4_100, 4_500, 8_000):
            tell(count)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step: 4,100 of 10,000 tokens, 100 a second, 00:59 left",
        "step: 8,000 of 10,000 tokens, 100 a second, 00:20 left",
    ]


def test_on_a_terminal_a_bar_with_speed_and_time_left(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.telling("step 7", 10_000, start=1_000) as tell:
        time.sleep(0.15)  # longer than a bar keeps still
        tell(6_000)
    shown = screen.getvalue()
    assert "step 7" in shown and re.search(r"6\.00k/10\.0k \[\d+:\d+<\d+:\d+, .*token/s\]", shown), shown
