"""Strict reading of JSON, JSON lines and YAML, and atomic replacement of files."""

import json
import os

import pytest

from dms_jax.errors import ConfigError
from dms_jax.files import parse_json, parse_yaml, read_json, read_jsonl, read_text, read_yaml, replacing, write_json


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"b": [{"a": 1, "a": 2}]}', "duplicate key 'a'"),
        (b"[" * 100_000, "nested"),
        (b"9" * 5000, "digits"),
        (b"{", "JSON"),
        (b"[1]", "JSON object"),
        (b'{"a": "\xff"}', "(utf|UTF)-8"),
    ],
)
def test_json_problem_names_the_file(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"x.json.*{words}") as refusal:
        read_json(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\na: 2\n", "duplicate key 'a'"),
        ("a: {b: 1, b: 2}", "duplicate key 'b'"),
        ("[" * 20_000, "nested"),
        ("a: [", "YAML"),
        ("a: 2024-99-99", "month"),
        ("- 1", "key: value"),
    ],
)
def test_yaml_problem_names_the_file(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"x.yaml.*{words}") as refusal:
        read_yaml(str(path))
    assert "\n" not in str(refusal.value)


def test_yaml_merge_key_may_be_overridden_and_empty_file_is_an_empty_mapping(tmp_path):
    assert parse_yaml("base: &b {x: 1, y: 2}\nnew: {<<: *b, x: 3}", "it")["new"] == {"x": 3, "y": 2}
    (tmp_path / "x.yaml").write_text("")
    assert read_yaml(str(tmp_path / "x.yaml")) == {}


def test_json_lines_come_with_their_place_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n \n[2]\n')
    assert list(read_jsonl(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 4", [2])]


@pytest.mark.parametrize("tail", ['{"a": ', '{"a": 1, "a": 2}'])
def test_torn_tail_is_ignored_only_where_allowed(tmp_path, tail):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' + tail)
    assert [value for _, value in read_jsonl(path, torn_tail_ok=True)] == [{"a": 1}]
    with pytest.raises(ConfigError, match="x.jsonl, line 2"):
        list(read_jsonl(path))
    path.write_text('{"a": 1}\n' + tail + "\n")  # a newline ends the line, so it was not torn
    with pytest.raises(ConfigError, match="x.jsonl, line 2"):
        list(read_jsonl(path, torn_tail_ok=True))
    path.write_text('{"a": 1}\n{"b": 2}')
    assert [value for _, value in read_jsonl(path, torn_tail_ok=True)] == [{"a": 1}, {"b": 2}]


def test_only_regular_files_are_read(tmp_path):
    """A pipe would block forever, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    paths = {
        tmp_path: "folder",
        tmp_path / "absent": "No such file",
        "nul\0": "null",
        tmp_path / "pipe": "pipe",
        "/dev/zero": "device",
        tmp_path / "link": "device",
    }
    for path, words in paths.items():
        with pytest.raises(ConfigError, match=f"^cannot read .*{words}") as refusal:
            read_text(path)
        assert str(refusal.value).count(str(path)) == 1


def test_git_lfs_pointer_is_named_as_one(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    for read in (read_json, read_text, read_yaml):
        with pytest.raises(ConfigError, match="config.json is a git-lfs pointer.*git lfs pull"):
            read(path)


def test_replacing_takes_the_place_of_the_file_on_success_only(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_replacing_reports_a_temporary_file_that_was_never_written(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_written_json_is_utf8_and_reads_back(tmp_path):
    path, value = tmp_path / "x.json", {"é": [1, {"b": None}]}
    write_json(path, value)
    assert read_json(path) == value and path.read_text(encoding="utf-8") == json.dumps(
        value, indent=2, ensure_ascii=False
    )
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_parse_json_message_begins_with_where():
    with pytest.raises(ConfigError, match="^the header is not valid JSON"):
        parse_json("{", "the header")
