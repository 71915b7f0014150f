"""The layers of the package: every module has a level, and imports go down only."""

import ast
from collections.abc import Iterator
from pathlib import Path

from layers import LEVELS

ROOT = Path(__file__).parent.parent
LEVEL = {name: level for level, line in enumerate(LEVELS) for name in line.split()}
# And level 0 only, so that a plan needs neither model nor engine.
PLANNING_MAY_IMPORT = ("dms_jax.core.cr_schedule", "dms_jax.core.page_counts")
ONLY_IN_HF = {"torch", "transformers", "safetensors", "gguf", "huggingface_hub", "tokenizers"}
ALL = ("dms_jax", "train", "infer", "benchmarks", "tests")  # the folders whose files and functions must be short
MAX_LINES = 400
MAX_FUNCTION_LINES = 60  # outside kernels


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, also inside functions.

    A name imported from a package counts as its module.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def modules() -> dict[str, Path]:
    """Return the path of every module of the package by its dotted name."""
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources("dms_jax")}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def home(module: str) -> str:
    """Return the folder or flat module of dms_jax that a dotted name belongs to; "" for dms_jax itself."""
    return module.partition(".")[2].split(".")[0]


def test_every_module_has_a_level():
    missing = {home(name) for name in modules() if name != "dms_jax"} - LEVEL.keys()
    assert not missing, missing
    stale = LEVEL.keys() - {home(name) for name in modules()}
    assert not stale, stale


def may_import(name: str, module: str) -> bool:
    """Decide whether the module `name` may import `module`.

    Other packages and the public names of dms_jax are always allowed.
    """
    here, there = home(name), home(module)
    if module.split(".")[0] in ("train", "infer", "tests", "benchmarks"):
        return False
    if not module.startswith("dms_jax.") or there not in LEVEL or there == here or LEVEL[there] == LEVEL[here] == 0:
        return True
    if here == "planning":
        return LEVEL[there] == 0 or module == "dms_jax.core" or module.startswith(PLANNING_MAY_IMPORT)
    return LEVEL[there] < LEVEL[here]


def test_layers_import_downwards_only():
    wrong = [
        f"{name} imports {module}"
        for name, path in modules().items()
        if name != "dms_jax"
        for module in imports(path)
        if not may_import(name, module)
    ]
    assert not wrong, wrong


def test_no_import_circles():
    known = modules()
    graph = {
        name: {m for m in imports(path) if m in known and m != name}
        for name, path in known.items()
        if name != "dms_jax"
    }
    graph = {name: found & graph.keys() for name, found in graph.items()}
    while leaves := {name for name, found in graph.items() if not found}:
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}
    assert not graph, f"modules in a circle, or above one: {sorted(graph)}"


def test_doors_hold_no_code():
    for folder in ("train", "infer"):
        for path in sources(folder):
            definitions = [
                n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.ClassDef)
            ]
            assert not definitions, f"{path} defines {definitions[0].name}; its place is in dms_jax"


def test_foreign_formats_are_read_in_hf_only():
    wrong = [
        f"{path} imports {module}"
        for path in sources("dms_jax")
        if "hf" not in path.parts
        for module in imports(path)
        if module.split(".")[0] in ONLY_IN_HF
    ]
    assert not wrong, wrong


def test_names_are_unique_and_files_are_short():
    names = [path.name for path in sources("dms_jax") if path.name != "__init__.py"]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    lengths = {path: len(path.read_text().splitlines()) for folder in ALL for path in sources(folder)}
    long = [f"{path}: {count} lines" for path, count in lengths.items() if count > MAX_LINES]
    assert not long, long


def long_functions() -> Iterator[str]:
    for path in (path for folder in ALL for path in sources(folder) if "kernels" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text())):
            length = (node.end_lineno or 0) - node.lineno + 1 if isinstance(node, ast.FunctionDef) else 0
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.name} has {length} lines"


def test_functions_are_short():
    assert not (found := list(long_functions())), found


def test_no_test_imports_another_test():
    files = sorted((ROOT / "tests").rglob("*.py"))
    wrong = [
        f"{path} imports {module}"
        for path in files
        for module in imports(path)
        if any(part.startswith("test_") for part in module.split("."))
    ]
    assert not wrong, wrong
