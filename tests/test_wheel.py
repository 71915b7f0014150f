"""The wheel holds everything: built, installed into an environment of its own, and used in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, Path]:
    """The Python of an environment that holds the wheel and the dependencies of this environment, and an empty
    folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because setuptools leaves a build folder in the tree that it builds
    source.mkdir()
    shutil.copytree(ROOT / "dms_jax", source / "dms_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for app in ("train", "infer"):
        shutil.copytree(ROOT / app, source / app, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder / "dist", source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", *(folder / "dist").glob("*.whl")], check=True)
    paths = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    # A path file adds the dependencies; the checkout, which an editable install adds by a file of its own, stays out.
    Path(paths.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = folder / "empty"
    work.mkdir()
    return python, work


def run(installed, *command: str) -> str:
    python, work = installed
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([python, *command], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_imports_from_its_own_files_and_generates(installed):
    code = f"""
import importlib.util, pathlib, sys, dms_jax
assert pathlib.Path(dms_jax.__file__).is_relative_to(sys.prefix), dms_jax.__file__
assert importlib.util.find_spec("train") is None and importlib.util.find_spec("infer") is None
model = dms_jax.load({str(GOLDEN / "qwen3_dms_projection_per_head")!r})
out = dms_jax.generate(model, [[1, 2, 3]], dms_jax.GenerationConfig(max_new_tokens=4, stop_ids=()))
print(out.tokens[0].tolist())
"""
    tokens = eval(run(installed, "-c", code))
    assert len(tokens) == 4


def test_wheel_retrofits_in_three_steps(installed):
    work = installed[1]
    np.save(work / "ids.npy", np.random.default_rng(0).integers(0, 97, (60, 70)).astype(np.int32))
    pairs = f"""
        model={GOLDEN / "llama3_rope_scaled"} data=ids.npy data.cache_dir=cache output=run \
steps=3 length=48 batch_size=2
        dms.window_size=4 dms.target_cr=2 eval_rows=1
    """
    settings = [part for pair in pairs.split() for part in ("--set", pair)]
    dms_jax = str(Path(installed[0]).with_name("dms-jax"))
    printed = run(installed, dms_jax, "retrofit", "--mesh", "2x1", *settings)
    assert "dms-jax evaluate" in printed and (work / "run" / "export" / "config.json").exists()
