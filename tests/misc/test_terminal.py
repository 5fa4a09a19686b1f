"""Text on the terminal, and streams that are closed, full or not UTF-8."""

import io
import os
import sys

import pytest

from misc.errors import UserError, printable
from misc.terminal import prepare_streams, report, show
from tests.helpers.streams import closed_pipe, full_device


@pytest.mark.parametrize(
    "text",
    ["\x1b[2Jred", "\x9b31m", "a\rb", "\x07", "\x7f", "\x00", "\x85", "\u2028", "\u202egpj.exe", "\u2066", "\ud800"],
)
def test_what_could_change_or_break_a_terminal_is_escaped(text, capfd):
    shown = printable(text)
    assert shown.isprintable() and shown.encode() and printable(shown) == shown
    assert str(UserError(f"{text} is wrong")).isprintable()
    show(text)
    report(text)
    assert capfd.readouterr() == (shown + "\n", shown + "\n")


@pytest.mark.parametrize("text", ["a table\n\twith two lines", "×→…✓", "山田", "👩‍🦰 é", "\\x1b"])
def test_other_text_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_character_can_be_printed_in_any_encoding(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    prepare_streams()
    show("32 × 16 → 山")
    shown = written.getvalue().decode(encoding)
    assert shown.startswith("32 ") and "16" in shown and shown.endswith("\\u5c71\n")


def test_a_closed_pipe_ends_nothing(monkeypatch):
    with closed_pipe() as out, closed_pipe() as err:
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        for _ in range(2):
            show("x" * 100_000)
            report("x" * 100_000)
        print("what another module prints", flush=True)


def test_a_full_disk_is_reported_for_results_only(monkeypatch):
    with full_device() as out, full_device() as err:
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        with pytest.raises(UserError, match="standard output cannot be written to .No space left on device"):
            show("a result")
        report("a message")


def test_streams_that_the_shell_closed_are_replaced(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    prepare_streams()
    with sys.stdout as out, sys.stderr as err:
        show("text")
        report("text")
        assert out.name == err.name == os.devnull
