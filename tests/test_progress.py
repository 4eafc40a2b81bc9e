"""What a person sees: in a pipe, in a terminal, in a notebook, and where nothing can be written."""
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading
from fcntl import ioctl
from types import SimpleNamespace

import pytest
import torch
from helpers import At, batches, learner, throw

from minifast import CancelEpoch
from minifast.schedules import time_limit as budget
from minifast.standard import progress

COLUMNS = 80
HEADER = "epoch  train_loss  valid_loss       error        time"
CONTROL = r"[^\n\x20-\x7e]"  # control characters, and what a bar is made of
ROW = r" {4}\d( {6}\d\.\d{4}){3} {7}\d\.\d\ds"


def error(pred, target):
    return (pred - target).abs().mean()


def trainer(n=3, **options):
    """A learner that shows what it does: `n` training batches, two of validation, one metric."""
    return learner(batches(n), batches(2, seed=1), **{"metrics": [error], "verbose": True} | options)


class Terminal:
    """A real terminal of 80 columns as standard output; `text`: all that was sent, `screen`: what is left to see."""

    def __enter__(self):
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self.stdout, sys.stdout = sys.stdout, open(slave, "w", encoding="utf-8")
        self.sent = []
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        return self

    def read(self):
        while True:
            try:
                chunk = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                return
            self.sent.append(chunk)

    def __exit__(self, *exception):
        sys.stdout.close()
        sys.stdout = self.stdout
        self.reader.join()
        os.close(self.master)
        self.text = b"".join(self.sent).decode()
        self.screen = rendered(self.text)


def rendered(text):
    """The lines that a terminal shows after `text`: carriage returns overwrite."""
    assert "\x1b" not in text, "no escape sequences: not every terminal knows them"
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part):]
        lines.append(shown.rstrip())
    return lines


def bars(text):
    """Every drawing of the bar."""
    return [part for part in re.split(r"[\r\n]+", text) if "%|" in part]


@pytest.fixture
def every_batch(monkeypatch):
    monkeypatch.setattr(progress, "REFRESH", 0.0)


def assert_is_table(lines, n_epochs):
    assert lines[0] == HEADER
    assert len(lines) == n_epochs + 1
    for epoch, line in enumerate(lines[1:]):
        assert re.fullmatch(ROW, line), line
        assert int(line[:5]) == epoch
        assert len(line) == len(HEADER)


# ---- a pipe or a file


@pytest.mark.case("R11")
def test_a_pipe_gets_a_header_and_a_line_per_epoch(capsys):
    trainer().fit(0.01, 3)
    out, err = capsys.readouterr()
    assert_is_table(out.splitlines(), 3)
    assert not re.search(CONTROL, out)
    assert err == ""


def test_every_cell_ends_under_the_end_of_its_name(capsys):
    def a_metric_with_a_long_name(pred, target):
        return 123456.0

    trainer(metrics=[error, a_metric_with_a_long_name]).fit(0.01, 2)
    header, *rows = capsys.readouterr().out.splitlines()
    ends = [match.end() for match in re.finditer(r"\S+", header)]
    assert len(ends) == 6
    for row in rows:
        assert [match.end() for match in re.finditer(r"\S+", row)] == ends
    assert "1.235e+05" in rows[0]


def test_the_header_is_repeated_when_there_is_a_new_column(capsys):
    """The first epoch is cancelled before validation."""
    cancel = At("before_batch", throw(CancelEpoch), 1)
    trainer(callbacks=[cancel]).fit(0.01, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["epoch", "train_loss", "time"]
    assert lines[2] == HEADER
    assert len(lines) == 4
    cancel.count, cancel.n = 0, 4  # and here the last one is: its cells stay empty
    trainer(callbacks=[cancel]).fit(0.01, 2)
    header, _, row = capsys.readouterr().out.splitlines()
    assert header == HEADER
    assert re.fullmatch(r" {4}1 {6}\d\.\d{4} {31}\d\.\d\ds", row)


def test_no_validation_data_no_columns(capsys):
    learner(batches(2), None, verbose=True, metrics=[error]).fit(0.01)
    assert capsys.readouterr().out.splitlines()[0].split() == ["epoch", "train_loss", "time"]


def test_the_finder_says_what_it_did(capsys):
    trainer().lr_find(num_it=12)
    out = capsys.readouterr().out
    assert re.match(r"12 learning rates = 4.0 epochs of 3 batches; training loss; stopped at .* because ", out)
    assert out.count("\n") == 2
    assert "epoch  " not in out


@pytest.mark.parametrize(("of_learner", "of_fit", "speaks"), [(False, None, False), (True, False, False),
                                                              (False, True, True), (True, None, True)])
def test_verbose(capsys, of_learner, of_fit, speaks):
    trainer(verbose=of_learner).fit(0.01, verbose=of_fit)
    out, err = capsys.readouterr()
    assert bool(out) is speaks
    assert err == ""


def test_a_silent_learner_is_silent_everywhere(capsys):
    learn = trainer(verbose=False)
    learn.lr_find(num_it=4)
    learn.fine_tune(1)
    learn.validate()
    learn.get_preds()
    with Terminal() as terminal:
        learn.fit_one_cycle(1, 0.1)
    assert capsys.readouterr() == ("", "")
    assert terminal.text == ""


# ---- a terminal


def test_a_terminal_keeps_the_table_and_loses_the_bar(every_batch):
    with Terminal() as terminal:
        trainer().fit(0.01, 3)
    assert_is_table(terminal.screen[:4], 3)
    assert terminal.screen[4:] in ([""], []), "the bar leaves nothing behind"
    drawn = bars(terminal.text)
    assert all(len(bar) < COLUMNS for bar in drawn), "a bar that wraps fills the screen"
    assert re.match(r"epoch 1/3:   0%\| +\| 0/9 \[00:00<\?\]", drawn[0])
    assert re.match(r"epoch 3/3:  78%\|█+.? *\| 7/9 \[00:00<00:00, loss \d\.\d{4}, lr 1\.00e-02\]",
                    next(bar for bar in drawn if "| 7/9" in bar))
    assert any("| 9/9 [00:00<00:00, validation batch 2]" in bar for bar in drawn)


def test_a_fit_that_is_limited_in_time_shows_the_share_of_the_time(every_batch, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(state):
        now[0] += 12.0

    with Terminal() as terminal:
        trainer(callbacks=[At("after_step", wait)]).fit(0.01, minutes=1)
    assert_is_table(terminal.screen[:3], 2)
    drawn = bars(terminal.text)
    assert all(len(bar) < COLUMNS for bar in drawn)
    assert re.match(r"epoch 1:   0%\| +\| \[00:00<\?\]", drawn[0])
    shares = [int(re.search(r"(\d+)%", bar).group(1)) for bar in drawn]
    assert sorted(set(shares)) == [0, 20, 40, 60, 80, 100]
    assert shares == sorted(shares)
    assert any(re.match(r"epoch 2:  60%.*\[00:00<00:00, loss \d\.\d{4}, lr 1\.00e-02\]", bar) for bar in drawn)


def test_the_number_of_steps_says_nothing_about_the_share_of_the_time(every_batch, monkeypatch):
    """Five steps that take no time, of a schedule with ten positions."""
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("minifast.training.fitting.TICKS", 10)

    def wait(state):
        now[0] += 60.0 if state.step == 5 else 0.0

    with Terminal() as terminal:
        trainer(callbacks=[At("after_step", wait)]).fit(0.01, minutes=1)
    assert {re.search(r"(\d+)%", bar).group(1) for bar in bars(terminal.text)} == {"0", "90"}


def test_beside_a_limit_in_time_the_bar_shows_what_is_nearer_to_the_end(every_batch, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(state):
        now[0] += 1.0

    with Terminal() as terminal:
        trainer(callbacks=[budget.TimeLimit(1), At("after_step", wait)]).fit(0.01, 2)
    assert any(re.match(r"epoch 2/2: 100%\|█+\| 6/6", bar) for bar in bars(terminal.text))


def test_a_table_that_is_too_wide_breaks_the_names(every_batch):
    learn = learner(batches(2), {"clean": batches(1), "noisy": batches(2, seed=1)}, metrics=[error], verbose=True)
    with Terminal() as terminal:
        learn.fit(0.01, 2)
    assert terminal.screen[:2] == [
        "                        clean       clean       noisy       noisy",
        "epoch  train_loss  valid_loss       error  valid_loss       error        time",
    ]
    assert [len(line) for line in terminal.screen[1:4]] == [len(terminal.screen[1])] * 3
    assert len(terminal.screen[1]) <= COLUMNS


@pytest.mark.parametrize("size", [0, 200])
def test_a_table_with_room_breaks_no_name(monkeypatch, size):
    """A terminal of 0 columns does not know how wide it is."""
    monkeypatch.setitem(globals(), "COLUMNS", size)
    learn = learner(batches(2), {"clean": batches(1), "noisy": batches(2, seed=1)}, metrics=[error], verbose=True)
    with Terminal() as terminal:
        learn.fit(0.01)
    assert terminal.screen[0].split() == ["epoch", "train_loss", "clean_valid_loss", "clean_error", "noisy_valid_loss",
                                          "noisy_error", "time"]  # fmt: skip


def test_the_bar_shows_the_smoothed_loss_of_this_fit(every_batch):
    learn = trainer(1)
    with Terminal() as terminal:
        learn.fit(0.01, 4)
    shown = [float(loss) for loss in re.findall(r"loss (\d\.\d{4}), lr", terminal.text)]
    assert sorted(set(shown)) == sorted({round(loss, 4) for loss in learn.recorder.smooth_losses})


@pytest.mark.case("R11")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_bar_goes_however_the_fit_ends(every_batch, error):
    learn = trainer(callbacks=[At("after_loss", throw(error), 4)])
    with Terminal() as terminal, pytest.raises(error):
        learn.fit(0.01, 3)
    assert_is_table(terminal.screen[:2], 1)
    assert terminal.screen[2:] in ([""], [])


def test_the_bar_shows_that_training_waits_for_its_data(every_batch):
    def wait(state):
        state.source.waiting.waited += 6.0
        state.source.waiting.worked += 2.0

    with Terminal() as terminal:
        trainer(callbacks=[At("before_batch", wait)]).fit(0.01, 2)
    drawn = bars(terminal.text)
    assert any(re.search(r"\| 2/6 \[.*, loss \d\.\d{4}, 75% waiting for data\]", bar) for bar in drawn)
    assert all(len(bar) < COLUMNS for bar in drawn)
    assert terminal.text.count("training waits for its data 75 % of the time: the loader (list)") == 1


def test_the_finders_bar_goes_and_its_line_stays(every_batch):
    with Terminal() as terminal:
        trainer().lr_find(num_it=12)
    assert "lr_find:  50%|" in terminal.text
    assert re.match("12 learning rates = ", terminal.screen[0])
    assert re.match("suggestions: ", terminal.screen[1])
    assert terminal.screen[2:] == [""]


def test_the_bar_is_refreshed_by_the_clock_and_not_by_the_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(state):
        now[0] += 0.01

    with Terminal() as terminal:
        trainer(200, callbacks=[At("after_step", wait)]).fit(0.001)
    looks = {re.search(r"\d+/200", bar).group() for bar in bars(terminal.text)}
    assert 7 <= len(looks) <= 10, "2 seconds of 4 looks each"


# ---- where nothing can be written


def closed_file():
    file = io.StringIO()
    file.close()
    return file


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", encoding="utf-8", buffering=1)


def dead_terminal():
    master, slave = pty.openpty()
    os.close(master)
    return open(slave, "w", encoding="utf-8")


class Full(io.StringIO):
    """A terminal that is full, or gone, after 100 characters."""

    def isatty(self):
        return True

    def write(self, text):
        if self.tell() > 100:
            raise OSError(28, "No space left on device")
        return super().write(text)


@pytest.mark.case("R11")
@pytest.mark.parametrize("stdout", [closed_file, broken_pipe, dead_terminal, Full])
def test_output_that_cannot_be_written_stops_no_training(every_batch, monkeypatch, caplog, stdout):
    torch.manual_seed(0)
    silent, learn = trainer(verbose=False), trainer()
    silent.fit(0.01, 4)
    file = stdout()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        learn.fit(0.01, 4)
        learn.lr_find(num_it=4)
    assert len(learn.recorder.epochs) == 4
    assert torch.equal(learn.model.weight, silent.model.weight)
    said = [record.getMessage() for record in caplog.records if record.name == "minifast"]
    assert re.match(r"cannot write to standard output \(.+\): training goes on in silence", said[0])
    assert len(said) <= 3, "once for the fit, the finder and its result"
    try:
        file.close()
    except OSError:
        file.buffer.raw.close() if hasattr(file, "buffer") else None


def test_no_standard_output_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    trainer().fit(0.01)


# ---- other processes

SCRIPT = """
    import torch
    from minifast import Learner
    batch = torch.ones(4, 1), torch.ones(4, 1)
    learn = Learner(torch.nn.Linear(1, 1), ([batch] * 3, [batch]), torch.nn.functional.mse_loss, device="cpu")
"""


@pytest.mark.nightly
def test_a_piped_program_whose_reader_goes_away():
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT) + """
import sys
learn.lr_find(num_it=8)
learn.fit(0.01, 2)
learn.fit(0.01, verbose=False)
sys.stdin.readline()
learn.fit(0.01, 3)
print(len(learn.recorder.epochs), "epochs", file=sys.stderr)
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(5)]
    process.stdout.close()
    process.stdin.write("the reader is gone\n")
    process.stdin.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=100)
    assert lines[0].startswith("8 learning rates = ")
    assert lines[1].startswith("suggestions: ")
    assert lines[2] == "epoch  train_loss  valid_loss        time\n"
    assert [line[:5] for line in lines[3:]] == ["    0", "    1"]
    assert not re.search(CONTROL, "".join(lines))
    said = err.splitlines()
    assert said[0].startswith("cannot write to standard output (")
    assert said[1] == "3 epochs"
    assert said[2:] == [] or "BrokenPipeError" in err, "Python itself may complain when it closes the pipe"


@pytest.mark.nightly
def test_a_notebook(monkeypatch):
    """The table once, as plain text; plots once; nothing else: no widgets, no warnings, no empty output."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("MPLBACKEND")  # as a user's: the kernel draws inline
    fit = "from minifast.standard import progress\nprogress.REFRESH = 0\nlearn.fit(0.01, 2)"
    cells = [textwrap.dedent(SCRIPT) + fit,
             "found = learn.lr_find(num_it=40)\nax = learn.recorder.plot()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
    fit, finder = ([output for output in cell.outputs if output.get("data") != {}] for cell in notebook.cells)
    assert [output.output_type for output in fit] == ["display_data"]
    assert set(fit[0].data) == {"text/plain"}
    lines = fit[0].data["text/plain"].splitlines()
    assert lines[0] == "epoch  train_loss  valid_loss        time"
    assert [line[:5] for line in lines[1:]] == ["    0", "    1"]
    assert [output.output_type for output in finder] == ["stream", "display_data"]
    assert (finder[0].name, finder[0].text.count("\n")) == ("stdout", 2)
    assert set(finder[1].data) == {"text/plain", "image/png"}
