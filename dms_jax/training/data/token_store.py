"""Tokenize documents into a cache, and split them into training and held-out rows: the link from `documents` to `rows`.

A text document becomes [bos] ids [eos], with eos if the tokenizer has one and bos only if the tokenizer sets `add_bos`;
neither is added where the text already has it. A chat is formatted by the chat template. Ids from .npy files stay as
they are. The result is a function of (content, tokenizer, seed); neither the order of the files nor the number of hosts
matters. Begin with `load_rows`.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from dms_jax.config_reader import AtLeast, Between, check_ranges
from dms_jax.errors import ConfigError
from dms_jax.files import read_json
from dms_jax.hf.hub_dataset import open_dataset
from dms_jax.training.data.cached_content import Content, cache_folder, contents_of, file_sha256
from dms_jax.training.data.documents import Keys, expand_paths, read_documents
from dms_jax.training.data.rows import Rows, mix

CACHE_VERSION = 2  # to be raised with every change that alters the ids of a document
STORE_FILES = ("ids.bin", "offsets.npy", "hashes.npy")
MAX_HELD_OUT_SHARE = 0.2  # of a document with a larger share of all tokens, only the end is held out
ControlTokens = Literal["text", "all", "none"]
HeldOutBy = Literal["document", "position", "files", "nothing"]


class Tokenizer(Protocol):
    """The attributes of a tokenizer that this module uses.

    Optional are `add_bos: bool` and `special_ids: dict[str, int]`, the control tokens.
    """

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def hash(self) -> str: ...  # changes whenever the ids of any text may change
    def encode(self, text: str, *, control_tokens: bool = True) -> np.ndarray: ...
    def encode_chat(
        self, messages: list[dict], *, tools: list[dict] | None = None, control_tokens: bool = False
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class DataConfig:
    """The source of the text and its layout in rows."""

    paths: Annotated[
        tuple[str, ...],
        "files, folders or hf: names to train on; `data=FILE` is short for it; empty: the text of the embedded default",
    ] = ()
    eval_paths: Annotated[tuple[str, ...], "separate held-out files; empty: a part of data.paths is held out"] = ()
    text_key: Annotated[str, "key of the text in .jsonl and .parquet records"] = "text"
    messages_key: Annotated[str, "key of a chat in records without data.text_key"] = "messages"
    allow_control_tokens: Annotated[
        ControlTokens,
        "where a control token such as <|im_end|> that is spelled in the data counts as one: in documents of text, "
        "which may be rendered chats; in all documents, also in the content of messages; in none. Elsewhere it is text",
    ] = "text"
    rows: Annotated[
        Literal["contiguous", "packed"],
        "contiguous: all documents are concatenated and cut into rows, as in the reference; packed: each row holds "
        "whole pieces of documents, which do not see each other",
    ] = "contiguous"
    held_out_fraction: Annotated[
        float,
        Between(0, 1, exclusive_max=True),
        "fraction of the tokens to hold out, in whole documents; 0: hold nothing out",
    ] = 0.05
    cache_dir: Annotated[
        str, 'folder of cached tokens and downloads; "" is the folder dms_jax in the cache folder of the user'
    ] = ""
    max_documents: Annotated[
        int, AtLeast(0), "maximum number of documents to read from data.paths, and from data.eval_paths; 0: read all"
    ] = 0

    def __post_init__(self):
        if isinstance(self.paths, str) or isinstance(self.eval_paths, str):
            raise ConfigError(
                f"data.paths and data.eval_paths must be lists of files, got {self.paths!r} and {self.eval_paths!r}"
            )
        check_ranges(self, "data.")
        if not self.text_key or not self.messages_key:
            raise ConfigError("data.text_key and data.messages_key must not be empty")


@dataclass(frozen=True)
class DataSummary:
    """Counts of documents, tokens and rows, for the log."""

    documents: int
    empty_documents: int  # skipped
    train_tokens: int
    held_out_tokens: int
    train_rows: int
    held_out_rows: int
    dropped_tokens: int  # training tokens at the end that do not fill a contiguous row; always less than one row
    padding_fraction: float  # fraction of the packed training rows
    held_out_by: HeldOutBy
    overlap_documents: int  # excluded from training because data.eval_paths contains them, too
    cached: bool  # the tokens came from the cache
    content_hash: str  # hash of files, tokenizer and options; names the cache entry

    def __str__(self) -> str:
        notes = [f"{self.documents} documents", f"{self.train_tokens} training tokens in {self.train_rows} rows"]
        held_out = f"{self.held_out_tokens} (by {self.held_out_by}) in {self.held_out_rows} rows"
        notes.append(f"held out: {'nothing' if self.held_out_by == 'nothing' else held_out}")
        if self.empty_documents:
            notes.append(f"{self.empty_documents} empty documents skipped")
        if self.overlap_documents:
            notes.append(f"{self.overlap_documents} documents excluded because data.eval_paths contains them, too")
        if self.dropped_tokens:
            notes.append(f"{self.dropped_tokens} tokens dropped at the end")
        if self.padding_fraction:
            notes.append(f"{self.padding_fraction:.1%} padding")
        return ", ".join(notes) + (" [cached]" if self.cached else "")


# --- documents to ids, once ---


class TokenStore(NamedTuple):
    """Tokenized documents: document i is ids[offsets[i] : offsets[i + 1]]."""

    ids: np.ndarray  # uint32, memory-mapped
    offsets: np.ndarray  # int64 [documents + 1]
    hashes: np.ndarray  # uint64 [documents]; hash of the ids of each document
    empty_documents: int
    key: str = ""  # sha256 of everything that the ids depend on
    cached: bool = True


def tokenize(paths: tuple[str, ...], config: DataConfig, tokenizer: Tokenizer | None, vocab_size: int) -> TokenStore:
    """Return the documents of `paths` as ids, from the cache if they have been tokenized before.

    Several processes may call this at the same time.
    """
    names = expand_paths(paths, say=lambda line: print(line, file=sys.stderr))
    datasets = {name: open_dataset(name) for name in names if name.startswith("hf:")}
    contents = contents_of(names, datasets)
    key = _content_key(contents, config, tokenizer, vocab_size)
    folder = (
        cache_folder(config.cache_dir, "tokens") / hashlib.sha256(f"{CACHE_VERSION} {key}".encode()).hexdigest()[:32]
    )
    store = _open_store(folder)
    if store is not None:
        return store._replace(key=key)
    if folder.exists():
        print(f"the token cache {folder} is damaged; building it again", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(
            prefix="building-", dir=folder.parent, ignore_cleanup_errors=True
        ) as temporary:
            built = Path(temporary) / "store"
            built.mkdir()
            documents = (item for name in names for item in read_documents(name, _keys(config), datasets.get(name)))
            _write_store(built, documents, config, tokenizer, vocab_size, ", ".join(paths))
            for name, before, after in zip(names, contents, contents_of(names, datasets), strict=True):
                if before != after:
                    raise ConfigError(f"{name} changed while it was read; run again when no program writes to it")
            # Map the store before the move, so that its pages stay valid even if other processes replace the folder.
            store = _open_store(built)
            _install(built, folder, Path(temporary) / "replaced")
    except OSError as why:
        raise ConfigError(
            f"cannot write the token cache in {folder.parent}: {why}; set data.cache_dir to a writable folder with room"
        ) from why
    assert store is not None, f"{folder} does not verify right after it was written"
    return store._replace(key=key, cached=False)


def _keys(config: DataConfig) -> Keys:
    return Keys(config.text_key, config.messages_key)


def _content_key(contents: list[Content], config: DataConfig, tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """Return the hash of all that the ids depend on but the rules of this module. Checkpoints store it, so that
    training goes on with the same data."""
    rules = (
        [tokenizer.hash, tokenizer.bos_id, tokenizer.eos_id, getattr(tokenizer, "add_bos", False)] if tokenizer else []
    )
    files = [[content.name, content.digest] for content in contents]
    parts: list[Any] = [1, files, rules, vocab_size, _keys(config), config.max_documents]
    if config.allow_control_tokens != "text":  # the key of the default is that of checkpoints from before this option
        parts.append(config.allow_control_tokens)
    return hashlib.sha256(json.dumps(parts, default=int).encode()).hexdigest()


def _open_store(folder: Path) -> TokenStore | None:
    """Open the store in `folder`; None if it is missing or damaged."""
    try:
        meta = read_json(folder / "meta.json")
        if meta.pop("self") != _own_hash(meta) or any(
            file_sha256(folder / name) != meta["sha256"][name] for name in STORE_FILES
        ):
            return None
        ids = np.memmap(folder / "ids.bin", "<u4", "r")
        return TokenStore(ids, np.load(folder / "offsets.npy"), np.load(folder / "hashes.npy"), meta["empty_documents"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write_store(
    built: Path, documents: Iterator, config: DataConfig, tokenizer: Tokenizer | None, vocab_size: int, source: str
) -> None:
    offsets, hashes, empty = [0], [], 0
    with open(built / "ids.bin", "wb") as file:
        # `disable=None` shows the bar only on a terminal.
        for where, document in tqdm(documents, desc="tokenizing", unit=" documents", disable=None):
            ids = _ids(document, where, tokenizer, vocab_size, config.allow_control_tokens)
            if not len(ids):
                empty += 1
                continue
            file.write(ids.tobytes())
            offsets.append(offsets[-1] + len(ids))
            hashes.append(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little"))
            if len(hashes) == config.max_documents:
                break
    if not hashes:
        raise ConfigError(f"{source} must hold documents, got " + (f"only {empty} empty ones" if empty else "none"))
    np.save(built / "offsets.npy", np.array(offsets, np.int64))
    np.save(built / "hashes.npy", np.array(hashes, np.uint64))
    meta = {"empty_documents": empty, "sha256": {name: file_sha256(built / name) for name in STORE_FILES}}
    (built / "meta.json").write_text(json.dumps(meta | {"self": _own_hash(meta)}))


def _own_hash(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _install(built: Path, folder: Path, aside: Path) -> None:
    """Move a complete store to `folder`, and a damaged store that is already there to `aside`."""
    try:
        os.replace(built, folder)
    except OSError:  # the folder already exists
        if _open_store(folder) is None:  # an intact store was made by a faster process and has the same content
            with contextlib.suppress(OSError):  # another process may be replacing it right now
                os.replace(folder, aside)
                os.replace(built, folder)


def _ids(
    document: str | list | np.ndarray, where: str, tokenizer: Tokenizer | None, vocab_size: int, allow: ControlTokens
) -> np.ndarray:
    """Return the uint32 ids of one document, which may be empty. Raises ConfigError for ids outside the vocabulary."""
    hint = "use ids made with the tokenizer of this model"
    if isinstance(document, np.ndarray):
        ids = document
    elif not document or (isinstance(document, str) and not document.strip()):
        ids = np.zeros(0, np.uint32)
    elif tokenizer is None:
        raise ConfigError(
            f"{where} is text, but the model has no tokenizer; use token ids in a .npy file, or a model folder with "
            "tokenizer.json"
        )
    else:
        ids, hint = _encode(document, where, tokenizer, allow), "use the tokenizer of this model"
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        raise ConfigError(
            f"{where}: token id {ids[outside[0]]} at index {outside[0]} is outside the model's vocabulary of "
            f"{vocab_size}; {hint}"
        )
    return np.asarray(ids, "<u4")


def _encode(
    document: str | list, where: str, tokenizer: Tokenizer, allow_control_tokens: ControlTokens = "text"
) -> np.ndarray:
    allowed = allow_control_tokens == "all" or (allow_control_tokens == "text" and isinstance(document, str))
    if isinstance(document, str):
        ids = np.asarray(tokenizer.encode(document, control_tokens=allowed), np.int64)
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        # A rendered chat may have them already, and white space may follow its end.
        ends = tuple(text for text, id in getattr(tokenizer, "special_ids", {}).items() if id == eos and allowed)
        begin = [bos] if getattr(tokenizer, "add_bos", False) and bos is not None and bos not in ids[:1] else []
        end = [eos] if eos is not None and eos not in ids[-1:] and not (document.rstrip().endswith(ends)) else []
        return np.concatenate([np.asarray(part, np.int64) for part in (begin, ids, end)])
    tools = getattr(document, "tools", None)  # of a `chat_records.Chat`
    try:
        return np.asarray(tokenizer.encode_chat(document, tools=tools, control_tokens=allowed), np.int64)
    except Exception as why:  # a template may raise anything, e.g. that roles must alternate
        raise ConfigError(f"{where}: the chat template refuses these messages: {' '.join(str(why).split())}") from why


# --- ids to rows ---


def load_rows(
    config: DataConfig, tokenizer: Tokenizer | None, length: int, seed: int, vocab_size: int
) -> tuple[Rows, Rows, DataSummary]:
    """Return (training rows, held-out rows, summary). Rows have `length` tokens.

    The held-out rows come from `data.eval_paths`, or from whole documents of `data.paths` chosen by a hash of their
    content. Equal documents are thus on the same side of the split, and neither `length` nor the order of files changes
    it. If the documents are too few and too large to hold out whole ones, the end of each large document is held out
    ("by position"). `tokenizer` may be None if all files are .npy.
    """
    if length < 1:
        raise ConfigError(f"length must be at least 1, got {length}")
    if not config.paths:
        raise ConfigError("data.paths must name files to train on, got none; e.g. --set data=FILE.jsonl")
    store = held_store = tokenize(config.paths, config, tokenizer, vocab_size)
    sizes, overlap = np.diff(store.offsets), np.zeros(len(store.hashes), bool)
    if config.eval_paths:
        held_store = tokenize(config.eval_paths, config, tokenizer, vocab_size)
        overlap = np.isin(store.hashes, held_store.hashes)
        train_sizes, held_sizes, how = np.where(overlap, 0, sizes), np.diff(held_store.offsets), "files"
    else:
        train_sizes, how = _split(store.hashes, sizes, config.held_out_fraction, seed)
        held_sizes = sizes - train_sizes
    train = _rows(store, store.offsets[:-1], train_sizes, length, seed, config.rows)
    held_out = _rows(
        held_store, held_store.offsets[1:] - held_sizes, held_sizes, length, seed, config.rows, pad_short=True
    )
    if overlap.all():
        raise ConfigError(
            "data.paths must contain documents that data.eval_paths does not contain, got only the same ones"
        )
    if not train.num_rows:
        raise ConfigError(
            f"length must be at most the {train.tokens} training tokens, got {length}; use shorter rows, or more text"
        )
    summary = DataSummary(
        documents=len(store.hashes) + (len(held_store.hashes) if config.eval_paths else 0),
        empty_documents=store.empty_documents + (held_store.empty_documents if config.eval_paths else 0),
        train_tokens=train.tokens,
        held_out_tokens=held_out.tokens,
        train_rows=train.num_rows,
        held_out_rows=held_out.num_rows,
        dropped_tokens=train.tokens - train.used_tokens,
        padding_fraction=1 - train.used_tokens / (train.num_rows * length),
        held_out_by=how,
        overlap_documents=int(overlap.sum()),
        cached=store.cached and held_store.cached,
        content_hash=store.key,
    )
    return train, held_out, summary


def _rows(
    store: TokenStore,
    starts: np.ndarray,
    sizes: np.ndarray,
    length: int,
    seed: int,
    layout: str,
    pad_short: bool = False,
) -> Rows:
    # Shuffling by content mixes the domains in the rows, whatever the order of the files.
    order = np.argsort(mix(store.hashes, seed, 1), kind="stable")
    order = order[sizes[order] > 0]
    return Rows(store.ids, starts[order], sizes[order], length, layout, pad_short)


def _split(hashes: np.ndarray, sizes: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, HeldOutBy]:
    """Return (training tokens of each document, how the others were chosen).

    The other tokens are held out: all, or the end.
    """
    if fraction == 0:
        return sizes, "nothing"
    distinct, which = np.unique(hashes, return_inverse=True)
    # Copies of a document count together, because they are on the same side of the split.
    weights = np.bincount(which, sizes).astype(np.int64)
    budget, held_out = fraction * weights.sum(), np.zeros(len(distinct), bool)
    order, tokens = np.argsort(mix(distinct, seed, 2), kind="stable").tolist(), 0
    for document in order:
        if tokens + weights[document] <= budget:
            held_out[document], tokens = True, tokens + weights[document]
    if tokens >= budget / 2:
        return np.where(held_out[which], 0, sizes), "document"
    spare = [document for document in order if budget < weights[document] <= MAX_HELD_OUT_SHARE * weights.sum()]
    if spare:
        held_out[spare[0]] = True
        return np.where(held_out[which], 0, sizes), "document"
    ends = np.where((weights > budget)[which] & (sizes > 1), np.maximum(1, (sizes * fraction).astype(np.int64)), 0)
    return np.where(held_out[which], 0, sizes - ends), "position"
