"""Habits of the command line: suggestions, --json, --quiet, --verbose, colours, widths, completion, other libraries."""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import complaint, lavender, write_run
from lavender.cli import output
from lavender.cli.eval import _table
from lavender.cli.inspect import as_text
from lavender.cli.main import DONE, VERBS, WRONG_USAGE, build_parser
from lavender.cli.quiet import LARGEST_LOG, libraries_logged, log_path
from lavender.cli.stopping import unexpected
from lavender.cli.terminal import show, table
from lavender.errors import nearest
from lavender.world import STUDENT_PATH

LEAVES = [leaf.prog.split()[1:] for leaf in build_parser().leaves()]


def test_help_is_quick():
    """Beside an interpreter that does nothing: it took 8 times that CPU time, and importing torch over 100 times."""
    assert _cpu_seconds("-m", "lavender.cli", "--help") < 16 * _cpu_seconds("-c", "")


def _cpu_seconds(*arguments: str) -> float:
    """User and system time of the process; the least of five, because a busy machine only adds to it."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


# what is misspelt


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("extrakt",), "write extract, or see `lavender --help`."),
        (("store", "veryfy", "s"), "write verify, or see `lavender store --help`."),
        (
            ("extract", "--data", "d", "--teacher", "t", "--ouput", "o"),
            "write --out, or see `lavender extract --help`.",
        ),
        (("extract", "--data=d", "--techer=t", "--out=o"), "write --teacher, or see `lavender extract --help`."),
        (("data", "inspect", "d", "--colums", "x"), "write --columns, or see `lavender data inspect --help`."),
        (("study", "main", "--split", "sealled"), "write sealed, or see `lavender study --help`."),
        (("extract", "--data", "d", "--zzz"), "see `lavender extract --help`."),
    ],
)
def test_the_nearest_right_word_is_named(arguments, advice):
    ran = lavender(*arguments)
    assert ran.code == WRONG_USAGE
    assert ran.err.endswith(f"Do this: {advice}\n")


def test_an_abbreviated_option_and_a_value_with_dashes_are_no_mistakes():
    parser = build_parser()
    assert parser.parse_args(["extract", "--dat", "d", "--teach", "t", "--out", "o"]).data == Path("d")
    assert parser.parse_args(["look", "m", "p.jpg", "a dog", "--answer=--no such option"]).answer == "--no such option"
    assert parser.parse_args(["look", "m", "p.jpg", "--", "--no-option"]).text == "--no-option"


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("attention_loss=masss", "write 'mass' instead"),
        ("pooling=layer-meen", "write 'layer-mean' instead"),
        ("freeze=[vision_towr]", "write 'vision_tower' instead"),
        ("lr_scheduler_type=cosin", "write 'cosine' instead"),
        ("lora.rr=8", "write 'r' instead"),
        ("loar.r=8", "write 'lora' instead"),
    ],
)
def test_the_nearest_value_of_a_setting_is_named(setting, advice, tmp_path):
    line = complaint(lavender("train", write_run(tmp_path), "--set", setting), WRONG_USAGE)
    assert line.endswith(f"Do this: {advice}.")


def test_nothing_similar_is_no_suggestion():
    assert nearest("zzz", ["mass", "kl"]) is None


# what every verb has


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_verb_has_the_options_of_output(words):
    ran = lavender(*words, "--help")
    assert ran.code == DONE
    assert all(f" {option}" in ran.out for option in ("--json", "--quiet", "--verbose"))


def test_the_verbs_and_actions_are_all_there():
    assert {words[0] for words in LEAVES} == set(VERBS)
    assert ["data", "overlap"] in LEAVES
    assert ["store", "push"] in LEAVES


def test_quiet_leaves_the_result_alone(store_path, tmp_path):
    merged = ("store", "merge", store_path, "--out")
    loud = lavender(*merged, tmp_path / "one")
    assert loud.out.startswith("5 records in ")
    assert lavender(*merged, tmp_path / "two", "--quiet") == type(loud)(DONE, "", "")
    assert lavender("store", "stats", store_path, "-q").out == lavender("store", "stats", store_path).out


def test_json_has_what_the_lines_say(store_path, tmp_path):
    ran = lavender("store", "merge", store_path, "--out", tmp_path / "one", "--json")
    assert json.loads(ran.out)["records"] == 5
    assert ran.err.startswith("5 records in ")
    (verified,) = json.loads(lavender("store", "verify", store_path, "--json").out)
    assert (verified["records"], verified["faults"]) == (5, [])
    listed = json.loads(lavender("study", "--list", "--json").out)
    assert {"name", "question", "full", "quick"} == set(listed[0])


def test_lines_of_the_work_itself_go_aside(capsys):
    parser = build_parser()
    for option, out, err in (("--json", "", "working\n"), ("--quiet", "", ""), ("--verbose", "working\n", "")):
        with output.own_lines(parser.parse_args(["demo", option])):
            print("working")
        assert capsys.readouterr() == (out, err)


def test_facts_as_lines():
    facts: dict[str, Any] = {"samples": 1200, "loss": {"mean": 0.5, "margin": 0.125}, "broken": [{}, {}]}
    facts |= {"of": {"a_b": None}, "alone": {"mean": 0.25, "margin": None}}
    assert list(output.fact_lines(facts)) == [
        "samples: 1,200",
        "loss: 0.500 ± 0.125",
        "broken: 2",
        "of:",
        "  a b: none",
        "alone: 0.250 (one picture)",
    ]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_memory_that_is_too_small_is_no_bug(error):
    found = str(unexpected(error))
    assert found.startswith(f"Got memory that is too small: {'CUDA out of memory' if str(error) else 'MemoryError'}.")
    assert "lower --batch-size" in found
    assert "bug" not in found


# other libraries


@pytest.fixture
def log(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("LAVENDER_DEBUG", "")
    monkeypatch.setenv("LAVENDER_LOG", str(tmp_path / "new" / "lavender.log"))
    return tmp_path / "new" / "lavender.log"


def say_something() -> logging.Logger:
    """A library that writes to stderr by a handler of its own, as transformers does."""
    logger = logging.getLogger("some_library")
    logger.propagate = False
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.warning("no torchvision here")
    warnings.warn("this is deprecated", FutureWarning, stacklevel=1)
    return logger


def test_other_libraries_write_to_the_log(log, capsys):
    with libraries_logged():
        say_something().error("out of memory")
    assert capsys.readouterr().err == "out of memory\n"
    lines = log.read_text()
    assert "some_library WARNING: no torchvision here" in lines
    assert "FutureWarning: this is deprecated" in lines
    assert "some_library ERROR: out of memory" in lines
    with pytest.warns(FutureWarning, match="deprecated"):
        say_something()  # outside, all is as it was
    assert "no torchvision here" in capsys.readouterr().err
    assert log.read_text() == lines


def test_verbose_shows_them_and_writes_no_log(log, capsys):
    with libraries_logged(verbose=True):
        say_something()
    said = capsys.readouterr().err
    assert said.startswith("no torchvision here\n")
    assert "this is deprecated" in said
    assert not log.exists()


def test_without_a_place_for_the_log_they_are_on_the_terminal(log, capsys):
    log.parent.write_text("a file where the folder should be")
    with libraries_logged():
        say_something()
    assert "no torchvision here" in capsys.readouterr().err


def test_a_long_log_is_moved_aside(log):
    log.parent.mkdir()
    log.write_bytes(b"x" * (LARGEST_LOG + 1))
    with libraries_logged():
        say_something()
    assert log.with_name("lavender.log.1").stat().st_size == LARGEST_LOG + 1
    assert log.read_text().count("no torchvision here") == 1


def test_the_place_of_the_log(monkeypatch, tmp_path):
    monkeypatch.delenv("LAVENDER_LOG", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert log_path() == tmp_path / "lavender" / "lavender.log"


# the terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "file", "coloured"),
    [
        ({}, Terminal(), True),
        ({}, io.StringIO(), False),
        ({"NO_COLOR": "1"}, Terminal(), False),
        ({"FORCE_COLOR": "1"}, io.StringIO(), True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, Terminal(), False),
        ({"TERM": "dumb"}, Terminal(), False),
    ],
)
def test_colours(variables, file, coloured, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    show("lavender train: Got x.", file, "lavender train:")
    assert file.getvalue() == ("\033[1;31mlavender train:\033[0m Got x.\n" if coloured else "lavender train: Got x.\n")


def test_a_table_that_is_too_wide_is_turned_and_then_taken_apart():
    rows = [["model", "answer_nll", "content_f1"], ["base", "1.25", "0.5"]]
    assert table(rows) == ["model  answer_nll  content_f1", "base         1.25         0.5"]
    assert table(rows, 20) == ["model       base", "answer_nll  1.25", "content_f1   0.5"]
    long = [*rows, ["a run with a long name", "1", "2"]]
    assert table(long, 40) == [
        "model       base  a run with a long name",
        "answer_nll  1.25                       1",
        "content_f1   0.5                       2",
    ]
    assert table(long, 39) == [
        "base",
        "  answer_nll  1.25",
        "  content_f1  0.5",
        "a run with a long name",
        "  answer_nll  1",
        "  content_f1  2",
    ]


def test_tables_fit_60_columns():
    scores = {"answer_nll": 1.25, "content_f1": 0.5, "entropy": 3.0, "map_agreement": None}
    assert max(map(len, _table({"base": scores, "aligned": scores}, {"entropy": 2.5}, 60))) <= 60
    facts = json.loads(lavender("inspect", STUDENT_PATH).out)
    assert max(map(len, as_text(facts, 60).splitlines())) <= 60


# completion


def completions(line: str) -> list[str]:
    """What the shell is told after a TAB at the end of the line."""
    pytest.importorskip("argcomplete", reason="the extra `completion` is not installed")
    script = "import os, sys; os.dup2(1, 8); from lavender.cli import main; main()"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": os.devnull, "ARGCOMPLETE_USE_TEMPFILES": ""}
    environment = {name: value for name, value in (os.environ | asked).items() if "STDOUT_FILENAME" not in name}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return [word.strip() for word in ran.stdout.split("\n")]


def test_the_shell_completes_verbs_options_and_values():
    assert completions("lavender ex") == ["extract", "export"]
    assert completions("lavender extract --tea") == ["--teacher"]
    assert completions("lavender study main --split s") == ["sealed"]


@pytest.mark.parametrize(
    ("flags", "got", "do"),
    [
        (["--steps", "20"], "--steps 20 with --mode 'noise'", "leave --steps out"),
        (["--mode", "ddim", "--seed", "4"], "--seed 4 with --mode 'ddim'", "leave --seed out"),
        (["--batch-size", "0"], "--batch-size 0", "change --batch-size"),
        (["--words", "nuon"], "--words ", "write 'noun' instead"),
        (["--mode", "null-text", "--set", "inversion_steps=3"], "inversion_steps=3 with --steps 10", "change one"),
        (["--set", "num_steps=20"], "num_steps=20 with --mode 'noise'", "leave num_steps out"),
    ],
)
def test_extract_names_the_flags_that_were_typed(flags, got, do, tmp_path):
    ran = lavender("extract", "--data", tmp_path, "--out", tmp_path / "maps", "--teacher", "world", *flags)
    line = complaint(ran, WRONG_USAGE)
    assert f"Got {got}" in line
    assert f"Do this: {do}" in line
