"""Files and datasets are read as documents; every fault in them is one line that names the place."""

import gzip
import json
import os
import sys
import types

import numpy as np
import pytest

from dms_jax.errors import ConfigError
from dms_jax.hf.hub_dataset import open_dataset
from dms_jax.training.data.documents import Keys, expand_paths, read_documents

KEYS = Keys("text", "messages")
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "héllo"}]


def read(path, keys=KEYS):
    return [document for _, document in read_documents(str(path), keys)]


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content, documents",
    [
        ("one\n\nstill one\n", ["one\n\nstill one"]),
        ("one\n\n\ntwo\n \n\t\n\n\nthree", ["one", "two", "three"]),
        ("one\r\n\r\n\r\ntwo\r\n", ["one", "two"]),
        ("one\n\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>\n", ["one\n\n\nstill one", "two"]),
        ("a <|endoftext|> inside a line is text", ["a <|endoftext|> inside a line is text"]),
        ("\ufeffbom", ["bom"]),
        ("", [""]),
        ("\n\n\none", ["", "one"]),
        ("one\n\ntwo\n\n", ["one\n\ntwo"]),
        ("one\n\n\n \n", ["one"]),
        ("one\n<|endoftext|> \n\n\n\ntwo\n<|endoftext|>", ["one", "two"]),
        ("<|endoftext|>\none", ["", "one"]),
        ("one \r\n  \r\ntwo\r", ["one \n  \ntwo\r"]),
    ],
)
def test_txt_splits_at_markers_or_at_two_blank_lines(tmp_path, content, documents):
    assert read(written(tmp_path / "a.txt", content)) == documents


def test_jsonl_holds_texts_and_chats(tmp_path):
    lines = [
        json.dumps({"text": "grüß", "id": 3}, ensure_ascii=False),
        "",
        json.dumps({"messages": CHAT}),
        '{"text": ""}',
    ]
    path = written(tmp_path / "ä.jsonl", "\ufeff" + "\r\n".join(lines))
    assert read(path) == ["grüß", CHAT, ""]
    assert [where for where, _ in read_documents(str(path), KEYS)] == [f"{path}, line {n}" for n in (1, 3, 4)]


def test_gzip_reads_like_plain_files(tmp_path):
    for name, content in [("a.jsonl", '{"text": "x"}\n{"text": "y"}\n'), ("a.txt", "x\n\n\ny")]:
        plain = written(tmp_path / name, content)
        assert read(written(tmp_path / f"{name}.gz", gzip.compress(content.encode()))) == read(plain) == ["x", "y"]


def test_parquet_reads_like_jsonl(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["x", None, "y"], "other": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["x", "", "y"]  # a null is an empty document
    parquet.write_table(pa.table({"messages": [CHAT, CHAT[:1]]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [CHAT, CHAT[:1]]
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", Keys("body", "m")) == ["x"]
    with pytest.raises(ConfigError, match=r"c.parquet .*'text' or 'messages'.*data.text_key.*body"):
        read(tmp_path / "c.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match="d.parquet: row 1: 'text' must be a string, got 1"):
        read(tmp_path / "d.parquet")


def test_tables_hold_the_shapes_of_json_lines(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tool = {"function": {"name": "clock", "zone": "UTC"}}
    columns = {
        "text": [None, "", "plain", None],
        "messages": [json.dumps(CHAT), json.dumps(CHAT[:1]), None, None],
        "tools": [[tool], None, None, None],
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found == [CHAT, CHAT[:1], "plain", ""] and found[0].tools == [tool] and found[1].tools is None
    parquet.write_table(pa.table({"conversations": [[{"from": "human", "value": "hi"}]]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [CHAT[:1]]
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    other = {"function": {"name": "sum", "arguments": {"n": 1}}}
    rows = [
        [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"role": "assistant", "tool_calls": [other]}],
    ]
    parquet.write_table(pa.table({"messages": rows}), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet") == [
        [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}],
        [{"role": "assistant", "content": "", "tool_calls": [other]}],
    ]
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match="d.parquet must have one column 'text', got 2"):
        read(tmp_path / "d.parquet")


@pytest.mark.parametrize("rows, as_dictionary", [(40, False), (4000, True)])
def test_table_that_unpacks_to_a_multiple_of_its_size_is_refused(tmp_path, monkeypatch, rows, as_dictionary):
    """A page says how large it becomes, but a dictionary does not: here all rows share one text."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"text": ["ab" * (2_000_000 // rows)] * rows})
    parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=as_dictionary, compression="zstd")
    assert len(read(tmp_path / "a.parquet")) == rows
    monkeypatch.setattr("dms_jax.files.MAX_LINE", 10_000)
    with pytest.raises(ConfigError, match="a.parquet unpacks to more than 100 times its size"):
        read(tmp_path / "a.parquet")


def test_document_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("dms_jax.training.data.documents.MAX_LINE", 100)
    assert len(read(written(tmp_path / "a.txt", ("a" * 40 + "\n\n\n") * 9))) == 9
    with pytest.raises(ConfigError, match=r"b.txt must have documents of at most .*<\|endoftext\|>"):
        read(written(tmp_path / "b.txt", ("a" * 40 + "\n\n") * 9))


def test_missing_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'a.parquet needs pyarrow: pip install "dms-jax\[data\]"'):
        read(written(tmp_path / "a.parquet", "x"))


def test_npy_is_one_document_or_one_per_row(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.uint16))
    np.save(tmp_path / "b.npy", np.arange(6).reshape(2, 3))
    assert [row.tolist() for row in read(tmp_path / "a.npy")] == [[0, 1, 2, 3, 4, 5]]
    assert [row.tolist() for row in read(tmp_path / "b.npy")] == [[0, 1, 2], [3, 4, 5]]


GOOD = b'{"text": "fine"}\n'
BAD_FILES = {
    "latin1.txt": ("caf\xe9".encode("latin-1"), r"latin1.txt, line 1: not UTF-8 \(byte 0xe9\)"),
    "nul.txt": (b"ab\0c", r"nul.txt, line 1 has a NUL"),
    "line.jsonl": (
        GOOD + b'{"text": "fine"',
        r"line.jsonl, line 2 is not valid JSON: Expecting ',' delimiter at column 16$",
    ),
    "deep.jsonl": (GOOD + b"[" * 200_000, r"deep.jsonl, line 2 .*nested"),
    "list.jsonl": (GOOD + b"[1]", r"list.jsonl, line 2: .*'text' or 'messages'.*\[1\]"),
    "twice.jsonl": (GOOD + b'{"text": "a", "text": "b"}', r"twice.jsonl, line 2 .*'text'"),
    "latin1.jsonl": (GOOD + b'{"text": "\xe9"}', r"latin1.jsonl, line 2: not UTF-8 \(byte 0xe9\)"),
    "nul.jsonl": (GOOD + rb'{"text": "a\u0000b"}', r"nul.jsonl, line 2: character 1 of 'text' is NUL"),
    "surrogate.jsonl": (rb'{"text": "a\ud800b"}', r"surrogate.jsonl, line 1 holds half of a surrogate pair"),
    "absent.jsonl": (GOOD + b'{"body": "x"}', r"absent.jsonl, line 2: .*'text' or 'messages'.*'body'"),
    "none.jsonl": (b"{}", r"none.jsonl, line 1: .*'text' or 'messages'"),
    "number.jsonl": (b'{"text": 5}', r"number.jsonl, line 1: 'text' must be a string, got 5"),
    "null.jsonl": (b'{"text": null}', r"null.jsonl, line 1: 'text' must be .*, got null"),
    "chat.jsonl": (b'{"messages": [{"role": "user"}]}', r"chat.jsonl, line 1: 'messages' must be a list of"),
    "chat2.jsonl": (
        b'{"messages": {"role": "user", "content": "x"}}',
        r"chat2.jsonl, line 1: 'messages' must be a list of",
    ),
    "cut.jsonl.gz": (gzip.compress(GOOD * 1000)[:-12], r"cannot read .*cut.jsonl.gz: it is damaged or not a .gz file"),
    "flipped.jsonl.gz": (
        gzip.compress(GOOD)[:10] + b"\xff" * 30,
        r"cannot read .*flipped.jsonl.gz: it is damaged or not a .gz file",
    ),
    "not.txt.gz": (b"plain text", r"cannot read .*not.txt.gz: it is damaged or not a .gz file"),
    "broken.parquet": (b"PAR1 but no more", r"broken.parquet is damaged or not a readable parquet file"),
    "broken.npy": (b"\x93NUMPY then nothing", r"broken.npy is damaged or not a readable npy file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_that_names_the_place(tmp_path, name):
    content, message = BAD_FILES[name]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ConfigError, match=message) as error:
        read(written(tmp_path / name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("array", [np.zeros((1, 1, 1), int), np.zeros(3), np.zeros(3, bool), np.array(5)])
def test_npy_without_ids_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ConfigError, match="a.npy must hold integer token ids"):
        read(tmp_path / "a.npy")


def test_pickles_in_npy_are_never_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ConfigError, match="a.npy"):
        read(tmp_path / "a.npy")


def test_folder_is_replaced_by_its_files(tmp_path):
    (tmp_path / "sub").mkdir()
    wanted = [written(tmp_path / name, "x") for name in ("a.txt", "b.jsonl", "sub/c.npy")]
    for other in ("README.md", ".hidden.txt"):
        written(tmp_path / other, "x")
    assert expand_paths((str(tmp_path), "hf:name")) == [*map(str, wanted), "hf:name"]


def test_hidden_files_and_links_out_of_a_folder_are_not_read_and_counted(tmp_path):
    """Hidden folders hold copies that an editor made, licenses of installed packages, or the history of the text."""
    root, outside = tmp_path / "data", written(tmp_path / "out.txt", "x")
    for name in (
        ".ipynb_checkpoints/a.txt",
        ".venv/lib/b.txt",
        "sub/.git/c.txt",
        ".hidden.txt",
        "a.txt",
        "sub/b.jsonl",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        written(root / name, "x")
    (root / "README.md").write_text("about")
    (root / "meta.json").write_text("{}")
    (root / "inside.txt").symlink_to(root / "a.txt")
    (root / "outside.txt").symlink_to(outside)
    (root / "loop").symlink_to(root)
    said = []
    wanted = [str(root / name) for name in ("a.txt", "inside.txt", "sub/b.jsonl")]
    assert expand_paths((str(root),), said.append) == wanted
    (line,) = said
    for words in ("4 hidden", "1 links that leave it", "1 linked folders", "1 of other kinds", "1 .json beside"):
        assert words in line
    named = (str(root / ".hidden.txt"), str(root / "outside.txt"), str(root / "meta.json"))
    assert expand_paths(named, said.append) == list(named) and len(said) == 1
    assert expand_paths((str(root / ".venv"),), said.append) == [str(root / ".venv/lib/b.txt")] and len(said) == 1
    (tmp_path / "chats").mkdir()
    only = written(tmp_path / "chats" / "a.json", "[]")
    assert expand_paths((str(tmp_path / "chats"),)) == [str(only)]


def test_links_to_the_blobs_of_a_hub_cache_are_read(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "c0ffee" / "data"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (snapshot / "a.txt").symlink_to(written(tmp_path / "datasets--a--b" / "blobs" / "123", "x"))
    assert expand_paths((str(snapshot),)) == [str(snapshot / "a.txt")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.npy", "a.parquet"])
def test_stand_ins_of_git_lfs_are_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(ConfigError, match=f"{name} is a git-lfs pointer"):
        read(written(tmp_path / name, pointer))


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="a.txt: it must be a regular file, got a pipe"):
        expand_paths((str(tmp_path / "a.txt"),))


def test_paths_that_lead_nowhere_are_named(tmp_path):
    with pytest.raises(ConfigError, match="absent.txt"):
        expand_paths((str(tmp_path / "absent.txt"),))
    with pytest.raises(ConfigError, match=r"a.pdf .*\.txt, .*hf:NAME.*save its text as \.txt"):
        expand_paths((str(written(tmp_path / "a.pdf", "x")),))
    with pytest.raises(ConfigError, match=r"\.txt"):
        expand_paths((str(tmp_path),))


@pytest.mark.parametrize(
    "name, called",
    [
        ("hf:org/set", ("org/set", "train")),
        ("hf:org/set:test", ("org/set", "test")),
        ("hf:org/set:train[:10]", ("org/set", "train[:10]")),
        ("hf:org/set:main", ("org/set", "main", "train")),
        ("hf:org/set:main:weird", ("org/set", "main", "weird")),
    ],
)
def test_datasets_are_named_by_config_and_split(monkeypatch, name, called):
    calls = []
    fake = types.SimpleNamespace(
        load_dataset=lambda *names, split: calls.append((*names, split)) or [{"text": "x"}, {"text": None}]
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    dataset = open_dataset(name)
    assert calls == [called]
    assert list(read_documents(name, KEYS, dataset)) == [(f"{name}: row 1", "x"), (f"{name}: row 2", "")]


def test_dataset_that_cannot_be_loaded_is_one_line(monkeypatch):
    def load_dataset(*names, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConfigError, match="cannot load hf:x: ConnectionError: no route to host; offline"):
        open_dataset("hf:x")
    with pytest.raises(ConfigError, match="NAME"):
        open_dataset("hf:a:b:c:d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="hf:x needs the datasets package: pip install"):
        open_dataset("hf:x")
