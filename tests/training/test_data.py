"""Documents become token ids and a held-out split once, and the cache never changes a result."""

import json
import multiprocessing
import os
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from dms_jax.config_reader import build
from dms_jax.errors import ConfigError
from dms_jax.training.data.token_store import DataConfig, _install, cache_folder, load_rows, tokenize

VOCAB = 258


class ByteTokenizer:
    """A tokenizer whose ids are bytes; 256 is eos and 257 bos. It counts its calls."""

    bos_id, eos_id = 257, 256

    def __init__(self, hash="bytes", add_bos=False):
        self.hash, self.add_bos, self.calls = hash, add_bos, 0

    def encode(self, text, *, control_tokens=True):
        self.calls += 1
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_chat(self, messages, *, tools=None, control_tokens=True):
        if messages[0]["role"] != "user":
            raise RuntimeError("Conversation roles must\nalternate")
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


TEXTS = [f"document {i}: " + "abcdefg"[i % 7] * (3 * i % 50) for i in range(60)]


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        paths=(jsonl(tmp_path / "a.jsonl", TEXTS),),
        cache_dir=str(tmp_path / "cache"),
        held_out_fraction=0.2,
        rows="packed",
    )


def load(config, tokenizer=None, length=64, seed=0, vocab_size=VOCAB):
    return load_rows(config, tokenizer or ByteTokenizer(), length, seed, vocab_size)


def texts_of(rows, seed=0):
    """The documents of one epoch of packed rows, which must be longer than any document."""
    found = []
    for i in range(rows.num_rows):
        batch = rows.batch(i, 1, seed)
        for segment in range(1, batch.segment_ids.max() + 1):
            found.append(bytes(batch.tokens[batch.segment_ids == segment].tolist()[:-1]).decode())
    return found


# --- the split ---


def test_documents_are_in_training_or_held_out_as_a_whole(config):
    train, held_out, summary = load(config, length=128)
    assert sorted(texts_of(train) + texts_of(held_out)) == sorted(TEXTS)
    assert (
        summary.held_out_by == "document"
        and 0.1 <= summary.held_out_tokens / (summary.train_tokens + summary.held_out_tokens) <= 0.2
    )
    assert summary.documents == 60 and summary.train_tokens == train.tokens == sum(
        len(text) + 1 for text in texts_of(train)
    )


def test_split_and_rows_do_not_depend_on_the_order_of_files(config, tmp_path):
    parts = tuple(jsonl(tmp_path / f"part{i}.jsonl", TEXTS[i::3]) for i in range(3))
    results = [load(replace(config, paths=paths)) for paths in (config.paths, parts, parts[::-1])]
    for train, held_out, _ in results[1:]:
        for rows, expected in ((train, results[0][0]), (held_out, results[0][1])):
            for step in range(5):
                for left, right in zip(rows.batch(step, 3, 1), expected.batch(step, 3, 1), strict=True):
                    np.testing.assert_array_equal(left, right)


def test_split_does_not_depend_on_length_or_layout_but_on_the_seed(config):
    held_out = [sorted(texts_of(load(config, length=length)[1])) for length in (128, 200)]
    assert held_out[0] == held_out[1] != sorted(texts_of(load(config, length=128, seed=1)[1]))
    assert load(config)[2].held_out_tokens == load(replace(config, rows="contiguous"))[2].held_out_tokens


def test_copies_of_a_document_are_on_one_side_of_the_split(config, tmp_path):
    train, held_out, _ = load(replace(config, paths=(jsonl(tmp_path / "b.jsonl", TEXTS * 3),)), length=128)
    left, right = texts_of(train), texts_of(held_out)
    assert not set(left) & set(right) and len(right) >= 3
    assert sorted(left + right) == sorted(TEXTS * 3)


def test_held_out_fraction_is_measured_in_tokens(config, tmp_path):
    texts = [*(f"short {i}" for i in range(40)), *(c * 100 for c in "abc")]
    config = replace(config, paths=(jsonl(tmp_path / "b.jsonl", texts),))
    for seed in range(10):  # a fifth of the documents often has two of the long ones, which are half of all tokens
        _, held_out, summary = load(config, seed=seed)
        assert 0.1 <= held_out.tokens / (summary.train_tokens + held_out.tokens) <= 0.2


@pytest.mark.parametrize("layout", ["contiguous", "packed"])
def test_single_document_is_split_by_position_without_gap(config, tmp_path, layout):
    (tmp_path / "one.txt").write_text("".join(chr(33 + i % 90) for i in range(999)))
    config = replace(config, paths=(str(tmp_path / "one.txt"),), held_out_fraction=0.05, rows=layout)
    train, held_out, summary = load(config, length=1000 if layout == "packed" else 950)
    assert summary.held_out_by == "position" and (summary.train_tokens, summary.held_out_tokens) == (950, 50)
    assert held_out.num_rows == 1  # less than a row, so it is padded
    ids = np.concatenate([rows.batch(0, 1, 0).tokens[rows.batch(0, 1, 0).loss_mask] for rows in (train, held_out)])
    assert ids.tolist() == [33 + i % 90 for i in range(999)] + [256]


def test_large_documents_are_not_held_out_whole_if_they_are_few(config, tmp_path):
    books = [c * 4000 for c in "abc"]
    _, _, summary = load(replace(config, paths=(jsonl(tmp_path / "b.jsonl", [*books, "tiny"]),)))
    assert summary.held_out_by == "position" and 0.15 < summary.held_out_tokens / 12000 < 0.25
    ten = [c * 100 for c in "abcdefghij"]  # each is 10% of the tokens, above the 5%: one whole document is held out
    _, held_out, summary = load(
        replace(config, paths=(jsonl(tmp_path / "t.jsonl", ten),), held_out_fraction=0.05), length=128
    )
    assert summary.held_out_by == "document" and len(texts_of(held_out)) == 1


def test_held_out_rows_may_be_none_or_from_other_files(config, tmp_path):
    train, held_out, summary = load(replace(config, held_out_fraction=0.0), length=128)
    assert held_out.num_rows == 0 and sorted(texts_of(train)) == sorted(TEXTS) and "held out: nothing" in str(summary)
    config = replace(config, eval_paths=(jsonl(tmp_path / "e.jsonl", ["fresh", *TEXTS[:5]]),))
    train, held_out, summary = load(config, length=128)
    assert sorted(texts_of(held_out)) == sorted(["fresh", *TEXTS[:5]]) and sorted(texts_of(train)) == sorted(TEXTS[5:])
    assert summary.overlap_documents == 5 and summary.held_out_by == "files"
    with pytest.raises(ConfigError, match="data.paths.*data.eval_paths"):
        load(replace(config, eval_paths=config.paths))


# --- ids ---


def test_documents_end_with_eos_and_begin_with_bos_only_if_the_tokenizer_adds_it(config, tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"text": "ab"}) + "\n" + json.dumps({"messages": chat}) + "\n")
    stores = [tokenize((str(path),), config, ByteTokenizer(add_bos=add_bos), VOCAB) for add_bos in (False, True)]
    assert [store.ids.tolist() for store in stores] == [[97, 98, 256, *b"<user>hi"], [257, 97, 98, 256, *b"<user>hi"]]
    assert stores[0].offsets.tolist() == [0, 3, 11]


def test_npy_ids_stay_as_they_are_and_need_no_tokenizer(config, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40).reshape(4, 10))
    config = replace(config, paths=(str(tmp_path / "a.npy"),), held_out_fraction=0.0, rows="contiguous")
    train, _, summary = load_rows(config, None, 10, 0, 40)
    assert sorted(train.batch(0, 4, 0).tokens.ravel().tolist()) == list(range(40)) and summary.documents == 4
    with pytest.raises(
        ConfigError, match=r"a.npy: row 3: token id 39 at index 9 is outside the model's vocabulary of 39"
    ):
        load_rows(config, None, 10, 0, 39)
    np.save(tmp_path / "a.npy", np.array([5, -1, 3]))
    with pytest.raises(ConfigError, match=r"a.npy: token id -1 at index 1"):
        load_rows(config, None, 2, 0, 40)


def test_text_without_a_tokenizer_or_with_one_of_another_model_is_refused(config):
    with pytest.raises(ConfigError, match="a.jsonl, line 1 .*tokenizer"):
        load_rows(config, None, 10, 0, VOCAB)
    with pytest.raises(
        ConfigError,
        match=r"a.jsonl, line 1: token id 256 at index 12 .* vocabulary of 256",
    ):
        load(config, vocab_size=256)


def test_chat_that_the_template_refuses_is_one_line(config, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": [{"role": "system", "content": "x"}]}))
    with pytest.raises(ConfigError, match="m.jsonl, line 1: .*Conversation roles must alternate"):
        load(replace(config, paths=(str(tmp_path / "m.jsonl"),)))


def test_empty_documents_are_counted_and_only_empty_ones_are_an_error(config, tmp_path):
    _, _, summary = load(replace(config, paths=(jsonl(tmp_path / "b.jsonl", ["", *TEXTS, " \n"]),)))
    assert (summary.documents, summary.empty_documents) == (60, 2) and "2 empty documents skipped" in str(summary)
    for name, content in (("e.txt", ""), ("e.jsonl", ""), ("b.jsonl", '{"text": ""}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=f"{name}.* documents"):
            load(replace(config, paths=(str(tmp_path / name),)))


def test_max_documents_reads_the_first_ones(config):
    train, _, _ = load(replace(config, max_documents=7, held_out_fraction=0.0), length=128)
    assert sorted(texts_of(train)) == sorted(TEXTS[:7])


def test_too_little_text_names_the_length_that_fits(config, tmp_path):
    config = replace(config, paths=(jsonl(tmp_path / "s.jsonl", ["abcd"]),), held_out_fraction=0.0, rows="contiguous")
    with pytest.raises(ConfigError, match="length .* 5 training tokens, got 6"):
        load(config, length=6)
    assert load(config, length=5)[0].num_rows == 1
    assert load(config, length=4)[2].dropped_tokens == 1
    assert load(replace(config, rows="packed"), length=6)[2].padding_fraction == pytest.approx(1 / 6)


# --- the cache ---


def test_cache_serves_the_same_content_and_nothing_else(config, tmp_path):
    tokenizer = ByteTokenizer()
    first, _, summary = load(config, tokenizer)
    assert tokenizer.calls == 60 and not summary.cached
    copy = str(tmp_path / "other.jsonl")
    shutil.copy(config.paths[0], copy)
    second, _, summary = load(replace(config, paths=(copy,), rows="contiguous"), tokenizer, length=32, seed=5)
    # The cache goes by content, not by name or layout.
    assert tokenizer.calls == 60 and summary.cached and "[cached]" in str(summary)
    for changed in (
        lambda: load(config, ByteTokenizer(hash="other")),
        lambda: load(config, ByteTokenizer(add_bos=True)),
        lambda: load(config, vocab_size=VOCAB + 1),
        lambda: load(replace(config, max_documents=50)),
        lambda: load(replace(config, paths=(jsonl(tmp_path / "a.jsonl", [*TEXTS[:-1], "changed"]),))),
    ):
        assert not changed()[2].cached and changed()[2].cached


@pytest.mark.parametrize("name", ["ids.bin", "offsets.npy", "hashes.npy", "meta.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "delete"])
def test_damaged_cache_is_rebuilt_and_reported_in_one_line(config, capfd, name, harm):
    good = load(config)[0].batch(0, 4, 0)
    (folder,) = cache_folder(config.cache_dir, "tokens").iterdir()
    capfd.readouterr()
    content = (folder / name).read_bytes()
    if harm == "delete":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(
            content[: len(content) // 2] if harm == "cut" else bytes([content[0] ^ 1]) + content[1:]
        )
    train, _, summary = load(config)
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "damaged" in error and not summary.cached
    np.testing.assert_array_equal(train.batch(0, 4, 0).tokens, good.tokens)
    assert load(config)[2].cached and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_failed_run_leaves_nothing_in_the_cache(config, tmp_path):
    path = jsonl(tmp_path / "b.jsonl", TEXTS)
    with open(path, "a") as file:
        file.write("{broken")
    with pytest.raises(ConfigError, match="b.jsonl, line 61"):
        load(replace(config, paths=(path,)))
    assert list(cache_folder(config.cache_dir, "tokens").iterdir()) == []


def _load_in_process(config, barrier, results):
    barrier.wait()
    train, _, _ = load(config)
    results.put((os.getpid(), train.batch(0, 4, 0).tokens.tolist()))


@pytest.mark.parametrize("damaged", [False, True])
def test_several_processes_may_build_one_cache_at_once(config, damaged):
    expected = load(replace(config, cache_dir=config.cache_dir + "2"))[0].batch(0, 4, 0).tokens.tolist()
    if damaged:
        load(config)
        (folder,) = cache_folder(config.cache_dir, "tokens").iterdir()
        (folder / "ids.bin").write_bytes(b"")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_load_in_process, args=(config, barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60)[1] for _ in workers]
    for worker in workers:
        worker.join()
    assert answers == [expected] * 3 and load(config)[2].cached
    assert len(list(cache_folder(config.cache_dir, "tokens").iterdir())) == 1


def test_install_replaces_a_damaged_store_only(config, tmp_path):
    load(config)
    (good,) = cache_folder(config.cache_dir, "tokens").iterdir()
    built, aside = tmp_path / "built", tmp_path / "aside"
    shutil.copytree(good, built)
    _install(built, good, aside)  # another process was faster
    assert built.exists() and not aside.exists()
    (good / "ids.bin").write_bytes(b"")
    # The move fails, as it does when another process makes it; that is not an error.
    _install(built, good, tmp_path / "absent" / "aside")
    _install(built, good, aside)
    assert not built.exists() and (aside / "ids.bin").read_bytes() == b"" != (good / "ids.bin").read_bytes()


def test_cache_folder_that_cannot_be_made_names_the_key(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="data.cache_dir"):
        load(replace(config, cache_dir=str(tmp_path / "file")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # as with a read-only home
    with pytest.raises(ConfigError, match="data.cache_dir"):
        load(replace(config, cache_dir=""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("", "tokens") == tmp_path / "xdg" / "dms_jax" / "tokens"


def test_full_disk_names_the_key(config, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dms_jax.training.data.token_store.np.save", full)
    with pytest.raises(ConfigError, match="No space left.*data.cache_dir"):
        load(config)


# --- configuration ---


def test_config_is_built_from_plain_values():
    config = build(DataConfig, {"paths": "a.jsonl", "rows": "packed"})
    assert config == DataConfig(paths=("a.jsonl",), rows="packed")
    for raw, message in (
        ({"held_out_fraction": 1.0}, "data.held_out_fraction"),
        ({"held_out_fraction": float("nan")}, "held_out_fraction.* finite"),
        ({"max_documents": -1}, "data.max_documents"),
        ({"rows": "padded"}, "contiguous, packed"),
        ({"text_key": ""}, "data.text_key"),
        ({"path": "x"}, "did you mean paths"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(DataConfig, raw)
    with pytest.raises(ConfigError, match="data.paths"):
        DataConfig(paths="a.jsonl")


def test_missing_paths_and_length_are_refused(config):
    with pytest.raises(ConfigError, match="data.paths .*--set data=FILE.jsonl"):
        load(DataConfig())
    with pytest.raises(ConfigError, match="length .*at least 1, got 0"):
        load(config, length=0)


def test_hf_datasets_are_cached_by_their_fingerprint(config, monkeypatch):
    class Dataset(list):
        _fingerprint = "f1"

    dataset = Dataset({"text": text} for text in TEXTS)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, split: dataset))
    config, plain = replace(config, paths=("hf:name",)), load(config)[0].batch(3, 4, 0)
    train, _, summary = load(config)
    np.testing.assert_array_equal(train.batch(3, 4, 0).tokens, plain.tokens)
    assert not summary.cached and load(config)[2].cached
    Dataset._fingerprint = "f2"
    assert not load(config)[2].cached
