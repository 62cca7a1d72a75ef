"""How a verb ends when something goes wrong: one line, the right exit code, and nothing of other libraries."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from command_line import complaint, lavender
from lavender import errors
from lavender.cli.main import FAILED, VERBS, WRONG_USAGE
from lavender.cli.stopping import UNEXPECTED
from lavender.errors import FileError, LavenderError, StoreError
from lavender.files import write_whole, writing
from lavender.world import STUDENT_PATH

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LavenderError)]
QUIET = {**os.environ, "LAVENDER_DEBUG": ""}

# errors keep their class and their parts


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickle(kind):
    again = pickle.loads(pickle.dumps(kind("a. b", "c", "d")))
    assert type(again) is kind
    assert (again.got, again.expected, again.do) == ("a. b", "c", "d")


class _Damaged(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise StoreError("a damaged shard, 7. of 9", "a whole one", "extract again")


def test_an_error_of_a_loaders_worker_is_what_it_is():
    with pytest.raises(StoreError) as found:
        next(iter(DataLoader(_Damaged(), num_workers=1)))
    assert (found.value.got, found.value.do) == ("a damaged shard, 7. of 9", "extract again")


# the disk


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (OSError(errno.EROFS, "Read-only file system", "/there/x"), "can be written to"),
        (RuntimeError("[enforce fail at inline_container.cc:863] . PytorchStreamWriter failed writing file"), "disk"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "free some space"),
    ],
)
def test_what_writers_raise_names_the_place(error, said):
    with pytest.raises(FileError) as found, writing("/there"):
        raise error
    assert "/there" in found.value.got
    assert said in found.value.do or said in found.value.got


@pytest.mark.parametrize("name", ["missing/page.html", "folder"])
def test_a_file_that_cannot_be_written_is_named_as_it_was_given(name, tmp_path):
    """And not by the name of the unfinished file, which is gone."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match=rf"^Got {tmp_path / name}: "), writing(tmp_path):
        write_whole(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_other_errors_pass_through_writing():
    with pytest.raises(KeyError), writing("/there"):
        raise KeyError("x")


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_reports_a_disk_that_refuses(verb, tmp_path, monkeypatch):
    def refuse(options):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "x"))

    monkeypatch.setitem(VERBS, verb, refuse)
    assert str(tmp_path / "x") in complaint(lavender(verb, *SMALLEST[verb]), FAILED)


SMALLEST: dict[str, tuple[str, ...]] = {
    "demo": (),
    "data": ("inspect", "d"),
    "extract": ("--data", "d", "--teacher", "t", "--out", "o"),
    "check": ("m", "--data", "d", "--maps", "s"),
    "train": ("run.yaml",),
    "eval": ("r",),
    "study": ("main",),
    "report": ("r",),
    "export": ("r", "--out", "o"),
    "inspect": ("m",),
    "look": ("m", "p.jpg", "a dog"),
    "store": ("stats", "s"),
    "env": (),
}

# exit codes: 2 for wrong usage and settings, 1 for what is missing or broken


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("extract", "--data", "nowhere", "--teacher", "world", "--out", "o"), FAILED),
        (("extract", "--data", "nowhere", "--teacher", "nowhere/at/all", "--out", "o"), FAILED),
        (("extract", "--annotations", "coco-panoptic", "--from", "nowhere", "--out", "o"), FAILED),
        (("extract", "--data", "d", "--teacher", "world", "--out", "o", "--grid", "1"), WRONG_USAGE),
        (("extract", "--data", "d", "--teacher", "world", "--out", "o", "--seed", "-1"), WRONG_USAGE),
        (("extract", "--data", "d", "--teacher", "world", "--out", "o", "--device", "toaster"), WRONG_USAGE),
        (("extract", "--teacher", "world", "--out", "o"), WRONG_USAGE),
        (("check", "nowhere/at/all", "--data", "nowhere", "--maps", "nowhere"), FAILED),
        (("check", str(STUDENT_PATH), "--data", "d", "--maps", "m", "--limit", "0"), WRONG_USAGE),
        (("train", "nowhere.yaml"), FAILED),
        (("eval", "nowhere"), FAILED),
        (("eval", "nowhere", "--limit", "0"), WRONG_USAGE),
        (("study", "mian"), WRONG_USAGE),
        (("study", "main", "--seeds", "1", "1"), WRONG_USAGE),
        (("study", "main", "--seeds", "-1"), WRONG_USAGE),
        (("study", "main", "--jobs", "0"), WRONG_USAGE),
        (("report", "nowhere"), FAILED),
        (("export", "nowhere", "--out", "o"), FAILED),
        (("inspect", "nowhere/at/all"), FAILED),
        (("store", "verify", "nowhere"), FAILED),
        (("store", "stats", "nowhere"), FAILED),
        (("store", "merge", "nowhere", "--out", "o"), FAILED),
        (("store", "export", "nowhere", "--out", "o"), FAILED),
        (("store", "import", "nowhere", "--out", "o"), WRONG_USAGE),
        (("store", "push", "nowhere", "someone/maps", "--dry-run", "o"), FAILED),
    ],
)
def test_exit_codes(arguments, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    complaint(lavender(*arguments), code)
    assert not list(tmp_path.iterdir()), "a verb that cannot begin leaves nothing"


def test_a_misspelt_study_names_the_nearest():
    assert "'main'" in complaint(lavender("study", "mian"), WRONG_USAGE)


# faults of the library


def test_an_error_that_nobody_foresaw_is_one_line_and_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVENDER_DEBUG", "0")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(options):
        raise KeyError("x")

    monkeypatch.setitem(VERBS, "demo", fail)
    ran = lavender("demo")
    assert ran.code == FAILED
    assert "Traceback" not in ran.err
    assert f"Got {UNEXPECTED}, KeyError: 'x'." in ran.err
    [log] = tmp_path.glob("lavender-*.log")
    assert str(log) in ran.err
    assert log.read_text().startswith("Traceback")


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LAVENDER_DEBUG", "1")

    def fail(options):
        raise KeyError("x")

    monkeypatch.setitem(VERBS, "demo", fail)
    with pytest.raises(KeyError):
        lavender("demo")


# signals and pipes

_WAITS = """
import os, signal, sys, time
from lavender.cli.main import VERBS, main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with it ignored
def wait(options):
    try:
        print('ready', flush=True)  # inside: a signal right after this line must find the clean-up in place
        time.sleep(60)
    finally:
        if {slow}:
            time.sleep(60)
VERBS['demo'] = wait
sys.exit(main(['demo']))
"""


@pytest.fixture
def start():
    """Starts a script and waits until it is ready; kills it at the end, whatever the test finds."""
    started: list[subprocess.Popen] = []

    def begin(script: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        with process:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_verb_with_one_line(start, number):
    process = start(_WAITS.format(slow=False))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.strip() == "stopped; what is complete is kept"


def test_a_second_signal_ends_it_at_once(start):
    process = start(_WAITS.format(slow=True))
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # it is cleaning up now, and would for a minute
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT


def test_a_reader_that_has_gone_is_no_error():
    script = (
        "import sys; from lavender.cli.main import VERBS, main\n"
        "VERBS['demo'] = lambda options: [print('x' * 1000) for _ in range(10000)] and 0\n"
        "sys.exit(main(['demo']))"
    )
    ran = subprocess.run(
        f'{sys.executable} -c "{script}" | head -n 1; echo ${{PIPESTATUS[0]}}',
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env=QUIET,
        check=True,
    )
    assert ran.stdout.splitlines()[-1] == str(128 + signal.SIGPIPE)
    assert ran.stderr == ""


# nothing but our own lines


def test_a_verb_prints_no_lines_of_other_libraries(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "lavender.cli", "inspect", str(STUDENT_PATH), "--picture", str(tmp_path / "x.png")],
        capture_output=True,
        text=True,
        env=QUIET,
        check=True,
    )
    assert ran.stdout.startswith("{")
    assert ran.stderr == ""
