"""Imports go down only: L0 <- core <- kernels | policies <- models <- hf, decoding, ... <- train | infer."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEVEL_0 = {"axes", "config", "strict_json", "sharding", "collectives", "command", "cost", "target_hardware", "provenance"}
MAY_IMPORT = {"core": {"core"}, "kernels": {"core", "kernels"}, "policies": {"core", "policies"}, "models": {"core", "kernels", "policies", "models"}}
ONLY_IN_HF = {"torch", "transformers", "safetensors", "gguf", "huggingface_hub", "tokenizers"}
MAX_LINES = 400


def imports(path: Path) -> set[str]:
    """Modules a file imports, also inside functions; names imported from a package count as its modules."""
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


def test_layers_import_downwards_only():
    wrong = []
    for path in sources("dms_jax"):
        parts = path.relative_to(ROOT / "dms_jax").parts
        layer = parts[0] if len(parts) > 1 else None
        allowed = MAY_IMPORT.get(layer)
        if layer is None and path.stem in LEVEL_0:
            allowed = set()
        for module in imports(path):
            top = module.split(".")
            if top[0] in ("train", "infer", "tests", "benchmarks"):
                wrong.append(f"{path} imports {module}")
            if top[0] == "dms_jax" and len(top) > 1 and allowed is not None and top[1] not in allowed | LEVEL_0:
                wrong.append(f"{path} imports {module}")
    assert not wrong, wrong


def test_apps_do_not_import_each_other():
    others = {"train": {"infer"}, "infer": {"train"}}
    wrong = [f"{path} imports {module}" for app in others for path in sources(app) for module in imports(path) if module.split(".")[0] in others[app]]
    assert not wrong, wrong


def test_foreign_formats_are_read_in_hf_only():
    wrong = [f"{path} imports {module}" for folder in ("dms_jax", "train", "infer") for path in sources(folder) if "hf" not in path.parts
             for module in imports(path) if module.split(".")[0] in ONLY_IN_HF]  # fmt: skip
    assert not wrong, wrong


def test_names_are_unique_and_files_are_short():
    files = [path for folder in ("dms_jax", "train", "infer") for path in sources(folder) if path.name != "__init__.py"]
    names = [path.name for path in files]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    long = [f"{path}: {count} lines" for path in files if (count := len(path.read_text().splitlines())) > MAX_LINES]
    assert not long, long
