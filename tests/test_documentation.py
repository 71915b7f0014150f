"""Everything that the pages name exists: files, modules, links, and the options of every command line."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from layers import LEVELS

from benchmarks import readme_figure
from dms_jax.command import DOORS
from dms_jax.evaluation.result_records import RECORDS
from dms_jax.files import read_jsonl
from dms_jax.policies import POLICIES
from dms_jax.tasks.registry import TASKS
from dms_jax.training.retrofit_config import read_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE_FOLDERS = sorted(path.parent.relative_to(ROOT) for path in (ROOT / "dms_jax").rglob("*/__init__.py"))
TOP_FOLDERS = {"dms_jax", "train", "infer", "benchmarks", "tests", "docs", "configs"}
FIRST_PARTS = TOP_FOLDERS | {folder.name for folder in PACKAGE_FOLDERS}
MODULES = {path.stem: path for path in (ROOT / "dms_jax").rglob("*.py") if not path.name.startswith("__")}
FOREIGN_MODULES = {"pip", "pytest", "venv"}
PLACEHOLDER = re.compile(r"[A-Z]{2,}|\.\.\.|\*")  # FOLDER, NAME_gpu.py, python -m ...
README_LINES, README_COLUMNS = 130, 120


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(text: str) -> tuple[list[str], list[str]]:
    """Return the lines of the fenced blocks of shell and Python code, with continuations joined, and the inline
    code."""
    blocks = re.findall(r"^```(?:bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines, [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def missing_path(token: str, page: Path) -> bool:
    """Is `token` a path in the repository that does not exist? A token may also be like `core/eviction.relax`."""
    token = re.sub(r"^[\w.-]+=", "", token.strip("\"'(),:;")).split("::")[0]
    if re.fullmatch(r"[a-z_]+\.py", token):
        return token not in {path.name for folder in TOP_FOLDERS for path in (ROOT / folder).rglob("*.py")}
    if "/" not in token or token.split("/")[0] not in FIRST_PARTS or not re.fullmatch(r"[\w./-]+", token):
        return False
    places = [base / token for base in (ROOT, ROOT / "dms_jax", ROOT / "docs", page.parent)]
    if any(place.exists() for place in places) or PLACEHOLDER.search(token):
        return False
    path, _, attribute = token.rpartition("/")[2].partition(".")
    return not (path in MODULES and not attribute.endswith("py") and defines(path, attribute))


def defines(module: str, attribute: str) -> bool:
    """Does the file of `module` define `NAME` or `Class.name`?"""
    body: list[ast.stmt] = ast.parse(MODULES[module].read_text()).body
    for name in attribute.split("."):
        found = [node for node in body if name in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def missing_constant(token: str) -> bool:
    """Is `token` like `dispatch.KERNELS`, with a module of the package that does not define the constant?"""
    found = re.fullmatch(r"(\w+)\.([A-Z][A-Z_]+)", token)
    return bool(found) and found[1] in MODULES and not defines(found[1], found[2])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_that_a_page_names_exist(page):
    lines, inline = code_of(page.read_text())
    tokens = {token for code in (*lines, *inline) for token in code.split()}
    missing = sorted(token for token in tokens if missing_path(token, page) or missing_constant(token))
    assert not missing, f"{page_id(page)} names what does not exist: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tests_that_a_page_names_exist(page):
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8"))
    missing = [f"{path}::{name}" for path, name in named if f"\ndef {name}(" not in (ROOT / path).read_text()]
    assert not missing, missing


def test_every_claim_about_reliability_names_its_test():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    claims = re.findall(r"^- (?:.+\n)(?:  .+\n)*", text.split("## Fuzz")[0], re.MULTILINE)
    assert len(claims) > 20
    assert not (bare := [claim[:60] for claim in claims if "::test_" not in claim]), bare


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_of_a_page_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?:|mailto:", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                broken.append(target)
    assert not broken, f"{page_id(page)} has broken links: {', '.join(broken)}"


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> Iterator[tuple[str, str]]:
    """Yield (where, command line) of the pages, of the docstrings of commands, and of the first line of each recipe."""
    for page in PAGES:
        lines, inline = code_of(page.read_text())
        yield from ((page_id(page), line) for line in (*lines, *inline))
    for path in sorted(path for folder in ("train", "infer", "benchmarks") for path in (ROOT / folder).glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        yield from ((page_id(path), line.strip()) for line in re.sub(r"\\\s*\n\s*", " ", doc).splitlines())
    for path in sorted((ROOT / "configs" / "train").glob("*.yaml")):
        yield page_id(path), path.read_text().splitlines()[0].removeprefix("# ")


def module_and_options(line: str) -> tuple[str, list[str]] | None:
    """Split a line that runs one of our commands into its module and its options; None for any other line."""
    found = re.match(r"(?:\w+=\S+ )*(?:python -m (?:dms_jax )?|dms-jax )(?=\w)", line)
    if found is None or PLACEHOLDER.search(line[found.end() :].split(" ")[0]):
        return None
    module, *options = shlex.split(line[found.end() :], comments=True)
    return DOORS.get(module, module), options


def test_modules_that_command_lines_run_exist():
    missing = []
    for where, line in commands():
        if (found := module_and_options(line)) and found[0].split(".")[0] not in FOREIGN_MODULES:
            path = found[0].replace(".", "/")
            files = [ROOT / f"{path}.py", ROOT / path / "__main__.py", ROOT / "tests" / path / "__main__.py"]
            if not any(file.exists() for file in files):
                missing.append(f"{where}: {line}")
    assert not missing, "\n".join(missing)


def test_options_of_command_lines_are_known():
    wrong, checked = [], 0
    for where, line in commands():
        module, options = module_and_options(line) or ("", [])
        if module.split(".")[0] not in ("train", "infer", "benchmarks") or not options or options == ["..."]:
            continue
        name = module.split(".")[1]
        home = module if module.startswith("benchmarks") else f"dms_jax.commands.{name}"
        try:
            parse = getattr(importlib.import_module(home), "parse", None)
            parsed = parse and parse(options)
            if name == "retrofit":
                config = parsed.config and str(ROOT / parsed.config)
                read_config(config, parsed.assignments, parsed.mesh)
        except (SystemExit, Exception) as why:  # a command may raise anything for a line that it does not understand
            wrong.append(f"{where}: {line}\n    {type(why).__name__}: {why}")
        checked += 1
    assert checked > 50 and not wrong, f"{checked} command lines, of which wrong:\n" + "\n".join(wrong)


def test_tree_names_every_folder_and_flat_module():
    text = (ROOT / "docs" / "README.md").read_text()
    tree = re.search(r"^```\n(dms_jax/.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert tree, "docs/README.md has no tree"
    named = {name for line in tree[1].splitlines() for name in line.strip().split("  ")[0].split()}
    wanted = {f"{folder.name}/" for folder in PACKAGE_FOLDERS}
    wanted |= {path.name for path in (ROOT / "dms_jax").glob("*.py") if not path.name.startswith("__")}
    assert not (missing := sorted(wanted - named)), f"the tree of docs/README.md lacks {', '.join(missing)}"
    places = [ROOT, ROOT / "dms_jax", *(ROOT / folder for folder in PACKAGE_FOLDERS)]
    stale = sorted(name for name in named if not any((place / name).exists() for place in places))
    assert not stale, f"the tree of docs/README.md names {', '.join(stale)}, which do not exist"


def test_contributing_lists_the_layers_of_the_layer_test():
    lines = re.findall(r"^\d+\. ((?:`\w+`,? ?)+):", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [re.findall(r"\w+", line) for line in lines] == [line.split() for line in LEVELS]


def test_pages_list_every_policy_and_task():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "policies.md").read_text(), re.MULTILINE)
    assert [row.strip("`") for row in rows] == list(POLICIES)
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "evaluate.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert not (missing := [name for name in (*RECORDS, *TASKS) if name not in named]), missing


def test_pages_are_all_listed_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index
    ]
    assert not missing, f"docs/README.md lacks {', '.join(missing)}"


def test_readme_fits_its_size():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= README_LINES
    assert not (wide := [number for number, line in enumerate(lines, 1) if len(line) > README_COLUMNS]), wide


def test_figure_is_drawn_from_the_numbers_of_the_tables(tmp_path):
    tables = (ROOT / "docs" / "results.md").read_text()
    for _, record in read_jsonl(readme_figure.MEASUREMENTS):
        if record.get("budget"):
            kl, low, high = (f"{record[key]:.4f}" for key in ("kl_mean", "kl_low", "kl_high"))
            assert re.search(rf"^{record['policy']}@{record['budget']} .* {kl} +{low}-{high} ", tables, re.MULTILINE), (
                record
            )
    curves = readme_figure.read_curves(str(readme_figure.MEASUREMENTS))
    assert len(curves) == 10 and curves["dms"][0][1] == pytest.approx((0.0066 + 0.0051 + 0.0036) / 3)
    readme_figure.main(["--output", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_checks_find_planted_faults():
    page = ROOT / "README.md"
    for token in (
        "dms_jax/no_such.py",
        "configs/train/none.yaml",
        "no_such_file.py",
        "core/eviction.no_such",
        "docs/x.md",
    ):
        assert missing_path(token, page), token
    for token in ("dms_jax/config.py", "core/eviction.relax", "dms_jax/kernels/NAME_gpu.py", "runs/mine/export"):
        assert not missing_path(token, page), token
    assert missing_constant("dispatch.NO_SUCH") and not missing_constant("kernel_table.KERNELS")
    assert module_and_options("dms-jax retrofit --resume") == ("train.retrofit", ["--resume"])
    assert module_and_options("python -m train.NAME") is None and anchors("# A b: `c`") == {"a-b-c"}
