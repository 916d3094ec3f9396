"""Long work speaks: bars and lines of progress, and reminders where nothing happens for long."""

import logging
import re
import time
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from sqa.cli import display
from sqa.cli.display import LiveDisplay, OutputClosed, PlainDisplay, Pulse, make_console, speak_of
from sqa.progress import StepReport, lasting


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr(display, "SILENCE", 0.2)
    return Console(file=StringIO(), width=80, markup=False, highlight=False)


def wait_for(said: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not said():
        assert time.monotonic() < end
        time.sleep(0.01)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def test_a_note_and_a_step_that_last_are_repeated_with_their_time(console: Console) -> None:
    with PlainDisplay(console) as shown:
        wait_for(lambda: "preparing, 0 s so far" in lines(console))
        shown.note("reading a[b]")
        wait_for(lambda: re.fullmatch(r"reading a\[b\], \d s so far", lines(console)[-1]))
        shown.start("compiling", 4)
        wait_for(lambda: re.fullmatch(r"compiling: step 0/4, \d s so far", lines(console)[-1]))
        shown.step(None)
        wait_for(lambda: re.fullmatch(r"compiling: step 1/4, \d s so far, \d s left", lines(console)[-1]))
        shown.finish("compiled")
        assert lines(console)[-1] == "compiled"
    count = len(lines(console))
    time.sleep(0.5)
    assert len(lines(console)) == count


def test_each_tenth_of_a_training_has_one_line_and_the_evaluation_after_it_reminders(console: Console) -> None:
    with PlainDisplay(console) as shown:
        shown.start("run", 20)
        for step in range(1, 21):
            shown.step(StepReport(step=step, loss=2.0, tokens=100 * step, seconds=60.0 * step))
        steps = [line for line in lines(console) if "loss 2.000" in line]
        assert len(steps) == 10
        assert steps[1] == "run: step 4/20  loss 2.000  2 tok/s  16 min left"
        wait_for(lambda: re.fullmatch(r"run: step 20/20, \d s so far", lines(console)[-1]))


def test_the_first_step_of_a_run_that_goes_on_has_a_time_left(console: Console) -> None:
    with PlainDisplay(console) as shown:
        shown.start("run", 20)
        shown.step(StepReport(step=9, loss=2.0, tokens=900, seconds=540.0))
        assert lines(console)[-1] == "run: step 9/20  loss 2.000  2 tok/s  11 min left"
        wait_for(lambda: re.fullmatch(r"run: step 9/20, \d s so far, 11 min left", lines(console)[-1]))


def test_displays_side_by_side_all_speak(console: Console) -> None:
    with PlainDisplay(console) as first:
        first.start("one", 3)
        second = first.beside()
        second.start("two", 3)
        wait_for(lambda: {line.split(":")[0] for line in lines(console) if "so far" in line} >= {"one", "two"})


def test_a_bar_speaks_for_itself_and_a_note_without_one_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SILENCE", 0.2)
    terminal = Console(file=StringIO(), width=80, force_terminal=True, markup=False, highlight=False)
    with LiveDisplay(terminal) as shown:
        shown.note("reading")
        wait_for(lambda: "reading, 0 s so far" in terminal.file.getvalue())
        shown.start("one", 3)
        before = terminal.file.getvalue().count("so far")
        time.sleep(0.6)
        assert terminal.file.getvalue().count("so far") == before
        shown.start("two", 3)  # as a measurement does in the middle of a training
        shown.finish("measured")
        assert not shown._progress.tasks
        shown.start("three", 3)
    assert terminal.file.getvalue().rindex("\x1b[?25h") > terminal.file.getvalue().rindex("\x1b[?25l")  # the cursor


def test_a_terminal_breaks_notes_between_words_and_a_file_keeps_them_whole(console: Console) -> None:
    text = " ".join(["figure 0.1234,"] * 12)
    terminal = Console(file=StringIO(), width=80, force_terminal=True, markup=False, highlight=False)
    LiveDisplay(terminal).note(text)
    PlainDisplay(console).note(text)
    broken = lines(terminal)
    assert max(map(len, broken)) <= 80
    assert " ".join(line.strip() for line in broken) == text
    assert lines(console) == [text]


def test_text_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("[b]runs[/b] sqa:100:key: 1.5")
    assert capsys.readouterr().out == "[b]runs[/b] sqa:100:key: 1.5\n"


def test_a_phase_that_ends_without_a_word_says_nothing(console: Console) -> None:
    with PlainDisplay(console) as shown:
        shown.start("measuring", 1)
        shown.finish("")
    assert lines(console) == ["measuring: 1 step"]


def test_a_logger_is_spoken_of_after_a_silence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "SILENCE", 0.2)
    said = ""

    def spoken() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "drawing a figure, 0 s so far" in said

    with speak_of("sqa.test"):
        logging.getLogger("sqa.test").info("drawing a figure")
        wait_for(spoken)


def test_a_reminder_to_a_closed_pipe_ends_the_work(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "SILENCE", 0.05)
    tried = []

    def remind() -> None:
        tried.append(1)
        raise OutputClosed("closed")

    pulse = Pulse(remind)
    with pulse:
        wait_for(lambda: tried)
        time.sleep(0.2)
        with pytest.raises(OutputClosed):
            pulse.heard()
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "1 h 0 min"), (5400, "1 h 30 min")]
)
def test_times_as_a_person_says_them(seconds: float, words: str) -> None:
    assert lasting(seconds) == words
