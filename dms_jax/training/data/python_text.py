"""Text that every Python carries: its language reference and the source of its standard library."""

import ast
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

from dms_jax.errors import ConfigError

WAY_OUT = "use text of your own: --set data=FILE"
MIN_TOPIC_CHARACTERS = 3000  # a shorter topic fills less than a row, so there is nothing to evict
MAX_MODULE_CHARACTERS = 14_000  # of one module, so that the code of many authors is in the mix
# Modules that Python 3.11 to 3.13 have under these names, without generated tables and tests.
MODULES = tuple(
    """
    argparse ast asyncio/base_events asyncio/locks asyncio/streams asyncio/tasks base64 bdb bisect bz2 calendar cmd code
    codecs collections/__init__ compileall concurrent/futures/_base concurrent/futures/process configparser contextlib
    copy csv ctypes/util dataclasses difflib dis email/contentmanager email/feedparser email/generator email/message
    email/utils enum filecmp fileinput fnmatch fractions ftplib functools getopt getpass gettext graphlib gzip hashlib
    heapq hmac html/parser http/client http/cookiejar http/cookies http/server imaplib importlib/util inspect ipaddress
    json/decoder json/encoder linecache locale logging/__init__ logging/config logging/handlers lzma mailbox mimetypes
    modulefinder multiprocessing/connection multiprocessing/managers multiprocessing/pool multiprocessing/queues netrc
    ntpath numbers operator optparse os pdb pickle pkgutil platform plistlib poplib posixpath pprint profile pstats
    py_compile pyclbr pydoc queue quopri random runpy sched selectors shelve shlex shutil smtplib socket socketserver
    ssl statistics string subprocess symtable tabnanny tarfile tempfile textwrap threading timeit tokenize
    tomllib/_parser trace traceback tracemalloc types typing urllib/parse urllib/request urllib/robotparser uuid
    venv/__init__ warnings wave weakref webbrowser wsgiref/handlers wsgiref/validate xml/dom/minidom xml/dom/pulldom
    xml/etree/ElementPath xml/etree/ElementTree xml/sax/saxutils xmlrpc/client xmlrpc/server zipapp zoneinfo/_zoneinfo
    """.split()  # noqa: SIM905  # a list of so many strings would be unreadable
)


def python_docs() -> Iterator[str]:
    """Yield the topics of the language reference, without short ones, in which nothing would be evicted."""
    try:
        from pydoc_data.topics import topics  # half a megabyte, imported only when needed
    except ImportError as why:
        raise ConfigError(f"this Python comes without pydoc_data.topics ({why}); {WAY_OUT}") from why
    yield from dict.fromkeys(text for _, text in sorted(topics.items()) if len(text) >= MIN_TOPIC_CHARACTERS)


def python_code(library: Path | None = None) -> Iterator[str]:
    """Yield the source of modules of the standard library, each up to a definition within `MAX_MODULE_CHARACTERS`.

    `library`: the folder of the modules; None stands for that of the running Python.
    """
    library = library or Path(os.__file__).parent
    for name in random.Random(0).sample(MODULES, len(MODULES)):  # so that a cap does not favor the letter A
        try:
            source = (library / f"{name}.py").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as why:
            raise ConfigError(f"this Python comes without the source of its module {name} ({why}); {WAY_OUT}") from why
        if beginning := _beginning(source):
            yield beginning


def _beginning(source: str) -> str:
    """Return a module up to the last function, method or class that begins within the limit."""
    if len(source) <= MAX_MODULE_CHARACTERS:
        return source
    body = ast.parse(source).body
    # The first statement of a class has to stay with its head.
    nodes = body + [inner for node in body if isinstance(node, ast.ClassDef) for inner in node.body[1:]]
    starts = sorted(
        min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        for node in nodes
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lines = source.split("\n")  # not splitlines(), which also splits at form feeds
    ends = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))
    allowed = [start for start in starts if ends[start] <= MAX_MODULE_CHARACTERS]
    return "\n".join(lines[: allowed[-1]]).rstrip() + "\n" if allowed else ""
