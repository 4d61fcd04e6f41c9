"""Nothing that a file says steers a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rslp.io.terminal import printable

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\u202ee\x08f\x7fg\x00h\u2066i"
SAY = """
import logging, sys
from rslp.io.terminal import guard_terminals
from rslp.upstream.command_line import strip_controls_in_rich
if guard_terminals():
    strip_controls_in_rich()
guard_terminals()
from rich.console import Console
from rich.live import Live
from rich.table import Table
text = sys.argv[1].replace("@", chr(0))
sys.stdout.write(f"name {text}\\n")
sys.stderr.writelines([f"error {text}\\n"])
print("print", text)
logging.warning("log %s", text)
sys.stdout.write("\\rbar 1\\rbar 2\\n\\x1b[32mgreen\\x1b[0m\\n")
table = Table(text)
table.add_row(text)
console = Console(file=None, force_terminal=True)
console.print(table)
with Live("x", console=console, refresh_per_second=1):
    sys.stderr.write(f"live {text}\\n")
raise ValueError(text)
"""


def said(*, terminal: bool) -> str:
    """What a process says to a terminal, or into a pipe."""
    reading, writing = pty.openpty() if terminal else os.pipe()
    argument = HOSTILE.replace("\0", "@")
    process = subprocess.Popen([sys.executable, "-c", SAY, argument], stdout=writing, stderr=writing)
    os.close(writing)
    parts = []
    try:
        while part := os.read(reading, 65536):
            parts.append(part)
    except OSError:
        pass
    finally:
        os.close(reading)
        assert process.wait() == 1
    return b"".join(parts).decode()


def test_what_a_file_says_steers_no_terminal() -> None:
    text = said(terminal=True)
    for start in ("name", "error", "print", "WARNING:root:log", "ValueError:"):
        assert rf"{start.removesuffix(':')}" in text
        assert r"a\x1b[2Jb\x1b]0;title\x07c\x9b31md\u202ee\x08f\x7fg\x00h\u2066i" in text.split(start)[1]
    assert "green" in text and "\x1b[32m" not in text
    assert r"bar 1\rbar 2" in text
    for sequence in ("\x1b[2J", "\x1b]0;", "\x9b", "\u202e", "\u2066", "\x08", "\x7f", "\x00"):
        assert sequence not in text, (sequence, text)
    # rich's own: the table's frame in colours, and the cursor that a bar hides.
    assert "\x1b[?25l" in text


def test_into_a_pipe_it_passes_as_it_is() -> None:
    assert f"name {HOSTILE}\n" in said(terminal=False)


@given(st.text())
def test_a_name_stays_on_its_line_and_plain_text_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in shown)
    assert not any(unicodedata.bidirectional(letter) in ("LRE", "RLE", "LRO", "RLO", "PDF") for letter in shown)
    assert len(shown.splitlines()) <= 1
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize("workflow", ["jobs"])
def test_the_table_of_runs_is_one_line_a_run(
    workflow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rslp.cli.main import main

    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path))
    run = tmp_path / "projects" / "p\x1b[2J" / "x\nforged  succeeded"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    assert main(["helios", workflow]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert r"p\x1b[2J" in lines[1]
    assert r"x\nforged" in lines[1]
