"""Settings files: what is read from YAML, and what is refused, with the line."""

from __future__ import annotations

import os

import pytest
import yaml

from lavender.errors import ConfigError, DataError
from lavender.training.yaml_files import DEEPEST, LARGEST_FILE, MOST_VALUES, parse_yaml, read_settings, yaml_text

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)


def failure(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "run.yaml")
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        ("-3", -3),
        ("+4", 4),
        ("0", 0),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("0x1f", 31),
        (".inf", float("inf")),
        ("true", True),
        ("no", False),
        ("null", None),
        ("~", None),
        ("'1'", "1"),
        ("1:30", "1:30"),
        ("017", "017"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("2024-13-45", "2024-13-45"),
        ("=", "="),
        ("1e5x", "1e5x"),
        ("[1, a]", [1, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_values(text, value):
    found = parse_yaml(text, "run.yaml")
    assert found == value
    assert type(found) is type(value)


def test_aliases_and_merging_are_read():
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: *a\n"
    assert parse_yaml(text, "x") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "Got line 3 of run.yaml: the key 'a' twice, first in line 1."),
        ("x: {a: 1, 'a': 2}", "Got line 1 of run.yaml: the key 'a' twice, first in line 1."),
        ("5: x", "Got line 1 of run.yaml: a key '5', which is no text; put it in quotes."),
        ("true: x", "a key 'true', which is no text"),
        ("~: x", "a key '~', which is no text"),
        (".nan: x", "a key '.nan', which is no text"),
        ("? [1]\n: x", "a key that is a list or mapping"),
        ("a: !!python/object/apply:os.system [x]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("a: !!python/name:os.system", "the tag"),
        ("a: !x y", "the tag '!x'"),
        ("a: !!set {b}", "the tag"),
        ("a: !!binary abc", "the tag"),
        ("a: !!timestamp abc", "the tag"),
        ("b: 1\na: !!int abc", "Got line 2 of run.yaml: 'abc', which is no int that can be read."),
        ("a: !!float ''", "which is no float"),
        ("a: !!bool abc", "which is no bool"),
        ("a: " + "9" * 5000, "which is no int that can be read"),
        ("<<: 5", "for merging"),
        ("a: &a\n  <<: *a", "*a stands inside of what it stands for"),
        ("&a {m: *a}", "*a stands inside of what it stands for"),
        ("a: *x", "undefined alias 'x'"),
        (BOMB, f"more than {MOST_VALUES:,} values"),
        ("a: " + "[" * 20000, f"more than {DEEPEST} levels deep"),
        ("".join(" " * level + "a:\n" for level in range(3000)), f"more than {DEEPEST} levels deep"),
        ("a: [" + "x," * 100_000 + "]", f"more than {MOST_VALUES:,} values"),
        ("a: 1\n---\nb: 1", "found another document"),
        ("a: [", "Got line 1 of run.yaml"),
        ("a: \0", "'\\x00'"),
        ("a: x\n\t- y", "Got line 2 of run.yaml"),
        ("a: \ud800", "'\\ud800'"),
    ],
    ids=lambda one: one[:30],
)
def test_what_is_refused(text, message):
    assert message in failure(text)


def test_nothing_in_a_file_runs(tmp_path):
    for text in ("!!python/object/apply:os.mkdir ['{}']", "!!python/object/new:os.mkdir ['{}']"):
        failure(f"a: {text.format(tmp_path / 'made')}")
    assert not (tmp_path / "made").exists()


def test_files(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: caf\xc3\xa9\r\nmax_steps: 3\r\n")
    assert read_settings(path) == {"model": "café", "max_steps": 3}
    path.write_bytes(b"")
    assert read_settings(path) == {}
    path.write_text("- 1")
    with pytest.raises(ConfigError, match=r"Got a list in .*run\.yaml\. Expected settings"):
        read_settings(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# caf\xe9\n", "whose byte 0xe9 at offset 5 is not UTF-8. Expected text in UTF-8. Do this: save the file as"),
        ("model: x".encode("utf-16"), "whose byte 0xff at offset 0 is not UTF-8"),
        (b"a: " + b"x" * LARGEST_FILE, "a file of more than 256 KiB"),
    ],
    ids=["latin-1", "utf-16", "large"],
)
def test_files_that_are_no_settings(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    """What is missing is no wrong setting."""
    with pytest.raises(DataError, match=r"Got no file at .*no\.yaml\. Expected a YAML file"):
        read_settings(tmp_path / "no.yaml")
    with pytest.raises(DataError, match="which cannot be read: Is a directory"):
        read_settings(tmp_path)
    with pytest.raises(DataError, match="which cannot be read: File name too long"):
        read_settings(tmp_path / ("a" * 300))
    with pytest.raises(DataError, match="which cannot be read: embedded null byte"):
        read_settings("a\0b")


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match="which is no ordinary file"):
            read_settings(path)


def test_what_is_written_is_read_back_as_it_was():
    settings = {
        "text": ["1:30", "2024-01-01", "017", "5e-4", "no", "y", "~", "1_000", "=", "<<", "café", "", "0x1f"],
        "value": [1e-5, 5e-4, 1, 1.0, True, None, 1e30, -3],
        "nested": {"a": {"b": [{}, []]}},
    }
    text = yaml_text(settings)
    assert parse_yaml(text, "x") == settings
    assert yaml.safe_load(text) == settings  # as readers of YAML 1.1 do
