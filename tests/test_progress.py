"""The line of progress: rewritten on a terminal, now and then in a log."""

import io
import math

import pytest

from refusion_jax import progress as progress_lib
from refusion_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [1000.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    return now


def test_log_gets_a_line_per_report():
    log = io.StringIO()
    progress = Progress("step", 2000, stream=log, every=0)
    values = {"loss": 1.23456, "ar": 123.4, "lr": 1.5e-4, "tok/s": 12345.6, "padding": "2.5%"}
    progress.show(20, values, eta=3725.9)
    progress.show(40, eta=math.inf)
    assert log.getvalue() == (
        "step 20/2000  loss 1.2346  ar 123  lr 0.00015  tok/s 12,346  padding 2.5%  eta 1:02:05\nstep 40/2000  eta ?\n"
    )


def test_log_gets_a_line_now_and_then_and_every_word_of_its_own(clock):
    log = io.StringIO()
    progress = Progress("answer", 8, stream=log, every=10)
    for done in range(1, 5):
        clock[0] += 6  # seconds
        progress.show(done)
    progress.say("the end")
    assert log.getvalue() == "answer 2/8  eta 0:00:36\nanswer 4/8  eta 0:00:24\nthe end\n"


def test_what_was_done_before_says_nothing_of_the_time_that_is_left(clock):
    log = io.StringIO()
    progress = Progress("answer", 1000, begun=900, stream=log, every=0)
    for done in (901, 902):
        clock[0] += 2  # seconds
        progress.show(done)
    assert log.getvalue() == "answer 901/1000  eta 0:03:18\nanswer 902/1000  eta 0:03:16\n"


def test_terminal_shows_one_line_that_changes(clock):
    terminal = Terminal()
    progress = Progress("answer", 4, stream=terminal)
    for done, now in ((1, 1000.05), (2, 1000.2), (3, 1001.2)):  # the first one is too soon to be read
        clock[0] = now
        progress.show(done)
    progress.say("the end")
    shown = terminal.getvalue()
    assert "answer 1" not in shown and "answer 2" in shown and "answer 3" in shown
    assert shown.count("\n") == 1 and shown.endswith("\rthe end\033[K\n")


def test_only_the_first_process_shows_anything(capsys):
    progress = Progress("step", 5, every=0, enabled=False)
    progress.show(1)
    progress.say("hello")
    assert capsys.readouterr() == ("", "")
