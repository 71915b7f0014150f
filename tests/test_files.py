"""Strict reading of JSON, JSON lines and YAML, and atomic replacement of files."""

import gzip
import json
import os
import re
import sys

import pytest

from dms_jax import files
from dms_jax.errors import ConfigError
from dms_jax.files import (
    kinds_allowed,
    parse_json,
    parse_yaml,
    read_json,
    read_jsonl,
    read_lines,
    read_records,
    read_text,
    read_yaml,
    replacing,
    write_json,
)


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
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (rb'{"a": {"\uDC00b": 1}}', "half of a surrogate pair"),
        (b'{"a": ' + b"[" * 600 + b"]" * 600 + b"}", "nested"),
        (b'{\n"a" 1}', "':' delimiter at line 2, column 5"),
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


def test_line_ends_of_all_systems_become_newlines(tmp_path):
    (tmp_path / "x.txt").write_bytes("a\r\nb\rc\n\u2028".encode())
    assert read_text(tmp_path / "x.txt") == "a\nb\nc\n\u2028"


def test_infinity_and_nan_are_read_because_python_writes_them():
    assert parse_json("[Infinity, -Infinity]", "it") == [float("inf"), -float("inf")]
    assert json.dumps(parse_json(json.dumps([float("nan")]), "it")) == "[NaN]"


def packed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_read_like_plain_ones(tmp_path, packing):
    content = '\ufeff{"a": "é"}\n\n[1]\n{"b": 2}'.encode()
    (tmp_path / "x.jsonl").write_bytes(content)
    path = tmp_path / f"x.jsonl{packing}"
    half = content.index(b"[")
    path.write_bytes(packed(path.name, content[:half]) + packed(path.name, content[half:]))  # two parts are one file
    assert [value for _, value in read_jsonl(path)] == [value for _, value in read_jsonl(tmp_path / "x.jsonl")]
    assert read_text(path) == read_text(tmp_path / "x.jsonl")
    cut = path.read_bytes()[:-7]
    for damaged in (cut, b"plain", b"\0" * 30):
        path.write_bytes(damaged)
        with pytest.raises(
            ConfigError, match=f"^cannot read .*x.jsonl{packing}: it is damaged or not a {packing} file"
        ):
            list(read_jsonl(path))


def test_zstd_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'x.jsonl.zst needs pyarrow: pip install "dms-jax\[data\]"'):
        list(read_jsonl(tmp_path / "x.jsonl.zst"))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b" " * 400_000, b"\n" * 100_000])
def test_file_that_unpacks_to_a_multiple_of_its_size_is_refused(tmp_path, monkeypatch, packing, content):
    path = tmp_path / f"x.txt{packing}"
    path.write_bytes(packed(path.name, content))
    assert read_text(path) == content.decode()  # below MAX_LINE, every ratio is fine
    monkeypatch.setattr(files, "MAX_LINE", 200_000)
    for read in (read_text, lambda path: list(read_lines(path))):
        with pytest.raises(ConfigError, match=f"x.txt{packing}.* (100 times its size|0 MiB)"):
            read(path)
    monkeypatch.setattr(files, "MAX_RATIO", 10_000_000)
    assert read_text(path) == content.decode()


def test_lines_and_whole_texts_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 100)
    monkeypatch.setattr(files, "MAX_FILE", 1000)
    path = tmp_path / "x.txt"
    path.write_text("a" * 99 + "\n" + "b" * 100)
    assert [len(line) for _, line in read_lines(path)] == [100, 100]
    path.write_text("a\n" + "b" * 101)
    with pytest.raises(ConfigError, match="x.txt, line 2 must have at most"):
        list(read_lines(path))
    with open(path, "wb") as file:
        file.truncate(2**30)  # a sparse file: it takes no room on the disk
    with pytest.raises(ConfigError, match="x.txt must have at most"):
        read_text(path)


def test_records_are_lines_or_a_list_or_one_object(tmp_path):
    for name, text, wanted in [
        ("a.jsonl", '{"a": 1}\n{"a": 2}\n', [("a.jsonl, line 1", {"a": 1}), ("a.jsonl, line 2", {"a": 2})]),
        ("a.ndjson", '{"a": 1}', [("a.ndjson, line 1", {"a": 1})]),
        ("a.json", '\ufeff[{"a":\n1}, 2]', [("a.json, item 1", {"a": 1}), ("a.json, item 2", 2)]),
        ("A.JSON", '{"a": 1}', [("A.JSON", {"a": 1})]),
    ]:
        (tmp_path / name).write_text(text)
        assert list(read_records(tmp_path / name)) == [(str(tmp_path / where), value) for where, value in wanted]
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ConfigError, match="a.json is not valid JSON.* rename it to .jsonl"):
        list(read_records(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "name, hint",
    [
        ("a.csv", "; convert it.*read_csv"),
        ("a.CSV.gz", "; convert it.*read_csv"),
        ("a.tar.gz", "; unpack it first"),
        ("a.arrow", "; convert it.*to_parquet"),
        ("a.odd", "$"),
    ],
)
def test_other_kinds_are_refused_with_how_to_convert_them(name, hint):
    assert re.search(f"must end in .txt, got {name}{hint}", kinds_allowed(name, ".txt"))


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
