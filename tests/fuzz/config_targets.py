"""Configurations: YAML files, `--set` and `--mesh`, settings of generation."""

import dataclasses
import json
import random
from pathlib import Path

import yaml
from cases import TINY
from fuzz.fuzz_case import Target
from fuzz.model_targets import typed
from fuzz.mutations import HUGE, change_value, damage, nested, odd_value, replace_file, rewrite

from dms_jax.commands import inspect
from dms_jax.engine.decode_loop import sampling_of
from dms_jax.engine.generation_config import GenerationConfig
from dms_jax.errors import ConfigError
from dms_jax.policies import policy_of
from dms_jax.training.retrofit_config import RetrofitConfig, read_config

YAML = {
    "model": "some/folder",
    "data": {"paths": ["a.txt", "b.jsonl"], "rows": "packed", "held_out_fraction": 0.1},
    "steps": 300,
    "length": 2048,
    "batch_size": 8,
    "seed": 3,
    "mesh": "8x1",
    "dtype": "bfloat16",
    "dms": {"window_size": 256, "target_cr": 8, "decision_shift": 1, "tau": 0.1},
    "loss": {"order": "teacher_student", "compression_weight": 1.0},
    "optimizer": {"learning_rate": 1e-5, "warmup_steps": 10, "b1": 0.9},
    "save_every": 100,
    "tensorboard": False,
}
FILE = "run.yaml"
ODD_YAML = [
    "1:30",
    "2024-99-99",
    "!!python/object/apply:os.system ['true']",
    "!!binary x",
    "!!int x",
    "&a [*a]",
    "*unknown",
    "{a: 1, a: 2}",
    "[",
    "0o17",
    "~",
    "yes",
    ".nan",
    ".inf",
    "-.inf",
    "1e400",
    "9" * 5000,
    "[" * 3000,
    "{" * 3000,
    "? [x]",
    "<<: 3",
    "\t",
    "'\0'",
    "!!set {a}",
    "1_000",
    "0x10",
    "|\n x",
    "&a {x: &b [1, 2], y: *b}",
    "\ud800",
]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


# --- YAML files and --set ---


def make_yaml(folder: Path) -> None:
    (folder / FILE).write_text(yaml.safe_dump(YAML))


def mutate_yaml(rng: random.Random, folder: Path) -> str:
    path, kind = folder / FILE, rng.randrange(12)
    if kind == 0:
        return replace_file(rng, path)
    if kind < 6:
        raw = json.loads(json.dumps(YAML))
        how = change_value(rng, raw)
        path.write_text(json.dumps(raw))  # JSON is YAML
        return how
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    if kind == 6:
        path.write_text("\n".join([*lines, lines[at]]) + "\n")
        return f"duplicate line {lines[at]!r}"
    if kind == 7:
        lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(ODD_YAML)
        path.write_text("\n".join(lines), errors="surrogatepass")
        return f"line {lines[at][:60]!r}"
    if kind == 8:
        laughs = [LAUGHS, LAUGHS + "model: *i\n", LAUGHS + "data: {paths: *i}\n"]
        path.write_text(rng.choice([*laughs, "- a\n", "x", "---\na: 1\n---\nb: 2\n", "[" * 20_000, ": " * 3000]))
        return "another document"
    if kind == 9:
        lines[at] = lines[at].replace("  ", rng.choice(["\t", " ", "    ", ""]), 1)
        path.write_text("\n".join(lines))
        return f"indentation of {lines[at]!r}"
    return rewrite(path, lambda data: damage(rng, data))


def read_run(config: RetrofitConfig) -> dict:
    return flat(json.loads(json.dumps(dataclasses.asdict(config))))


def flat(raw: dict, path: str = "") -> dict:
    """The values of a nested mapping under dotted keys, each with its type."""
    found = {}
    for key, value in raw.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return typed(found) if not path else found


def meant_run(raw: dict, assignments: list[str] = (), mesh: str | None = None) -> dict:
    """The defaults with the given values laid over them. A text in place of a number is read as Python reads it."""
    default = json.loads(json.dumps(dataclasses.asdict(RetrofitConfig())))
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        *parents, last = key.strip().split(".")
        here = raw
        for parent in parents:
            if parent == "data" and not isinstance(here.get("data", {}), dict):
                here["data"] = {"paths": here["data"]}
            here = here.setdefault(parent, {})
        here[last] = yaml.safe_load(text)
    if not isinstance(raw.get("data", {}), dict):
        raw["data"] = {"paths": raw["data"]}
    if raw.get("mode", "adapter") != "adapter":
        default["dms"]["decision_shift"] = 1
    lay(default, raw)
    return flat(default | ({} if mesh is None else {"mesh": mesh}))


FLOATS_OR_NULL = "initial_cr", "compression_weight", "learning_rate"  # their default is null


def lay(over: dict, raw: dict) -> None:
    for key, value in raw.items():
        old = over[key]
        if isinstance(old, dict):
            lay(old, value)
        elif isinstance(old, list):
            over[key] = value if isinstance(value, list) else [value]
        else:
            assert isinstance(value, bool) == isinstance(old, bool)
            over[key] = float(value) if isinstance(old, float) or key in FLOATS_OR_NULL else value


def meant_inspection(folder: Path) -> dict:
    """The keys of a retrofit's file that count in an inspection, laid over the defaults of both."""
    given = strict_yaml(folder / FILE)
    meant_run(json.loads(json.dumps(given)))  # the whole file must be that of a retrofit
    counted = {key: value for key, value in given.items() if key in inspect.KEYS and key != "output"}
    return meant_run({**inspect.DEFAULTS, "init": "fisher"} | counted)


def strict_yaml(path: Path) -> dict:
    """The mapping in a YAML file without duplicate keys."""

    def check(node):
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            assert len({str(key) for key in keys}) == len(keys)
            for _, value in node.value:
                check(value)

    text = path.read_text()
    check(yaml.compose(text, yaml.SafeLoader))
    return yaml.safe_load(text) or {}


KEYS = [
    f"{key}.{inner}" if isinstance(value, dict) else key
    for key, value in dataclasses.asdict(RetrofitConfig()).items()
    for inner in (value if isinstance(value, dict) else [""])
]


def make_options(folder: Path) -> None:
    (folder / "options.json").write_text(json.dumps({"set": ["model=x", "steps=10"], "mesh": "2x1"}))


def mutate_options(rng: random.Random, folder: Path) -> str:
    values = [
        *ODD_YAML,
        "0",
        "-1",
        "1",
        "3",
        "0.5",
        "nan",
        "inf",
        "1e-4",
        "''",
        "[a, b]",
        "{x: 1}",
        "null",
        "true",
        "x=y",
        "8x1",
        "adapter",
        str(HUGE),
        "a" * 3000,
    ]
    chosen = [f"{rng.choice(KEYS)}={rng.choice(values)}" for _ in range(rng.choice([1, 1, 1, 2]))]
    if rng.random() < 0.3:
        text = rng.choice(
            [
                "=",
                "steps",
                "steps=",
                "=3",
                ".=3",
                "steps.x=3",
                "dms=3",
                "dms={}",
                "data=x",
                "data.=x",
                "data..paths=x",
                " steps =7",
                "a.b.c.d=1",
                "stepz=3",
                "dms.window=3",
                "\0=1",
                "x" * 5000,
                "." * 3000 + "=1",
                "optimizer=null",
                "data=[a]",
                "loss.order.x=1",
            ]
        )
        chosen.append(text)
    options = {"set": chosen, "mesh": rng.choice([None, "8x1", "x", "", "1" * 5000])}
    (folder / "options.json").write_text(json.dumps(options))
    return f"--set {chosen}"


def read_options(folder: Path) -> dict:
    options = json.loads((folder / "options.json").read_text())
    return read_run(read_config(None, options["set"], options["mesh"]))


def meant_options(folder: Path) -> dict:
    options = json.loads((folder / "options.json").read_text())
    return meant_run({}, options["set"], options["mesh"])


# --- generation ---

GENERATION = {
    "max_new_tokens": 8,
    "temperature": 0.7,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "stop_ids": [1, 2],
    "stop_strings": ["x"],
    "seed": [1, 2],
    "capacity": 16,
    "overflow": "evict",
    "chunk_size": 4,
    "threshold": 0.5,
    "policy": "tova:4",
}


def make_generation(folder: Path) -> None:
    (folder / "generation.json").write_text(json.dumps(GENERATION))


def mutate_generation(rng: random.Random, folder: Path) -> str:
    raw, key = dict(GENERATION), rng.choice(list(GENERATION))
    raw[key] = rng.choice(
        [
            odd_value(rng),
            0,
            -1,
            1,
            2**32,
            HUGE,
            1e999,
            "x",
            "grow",
            [1],
            [-1],
            [[1]],
            [2**32],
            nested(2),
            True,
            None,
            0.5,
        ]
    )
    (folder / "generation.json").write_text(json.dumps(raw))
    return f"{key} = {str(raw[key])[:40]!r}"


def read_generation(folder: Path) -> dict:
    raw = json.loads((folder / "generation.json").read_text())
    config = GenerationConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})
    assert sampling_of(config)
    policy_of(TINY, config.policy)
    if config.overflow not in (None, "evict"):
        raise ConfigError("overflow")  # read elsewhere
    return {key: repr(getattr(config, key)) for key in GENERATION}


def meant_generation(folder: Path) -> dict:
    """The given values, which must be within their ranges."""
    raw = json.loads((folder / "generation.json").read_text())
    ranges = {
        "max_new_tokens": (1, 2**31),
        "temperature": (0, 1e308),
        "top_k": (0, 2**31),
        "top_p": (1e-300, 1),
        "min_p": (0, 0.999999999),
        "repetition_penalty": (1e-300, 1e308),
        "chunk_size": (1, 2**31),
        "threshold": (float("-inf"), float("inf")),
    }
    for key, (low, high) in ranges.items():
        assert raw[key] is None or low <= raw[key] <= high, key
    return {key: repr(tuple(value) if isinstance(value, list) else value) for key, value in raw.items()}


TARGETS = [
    Target(
        "run YAML",
        200,
        make_yaml,
        mutate_yaml,
        lambda folder: read_run(read_config(str(folder / FILE), [], None)),
        lambda folder: meant_run(strict_yaml(folder / FILE)),
    ),
    Target(
        "inspection YAML",
        120,
        make_yaml,
        mutate_yaml,
        lambda folder: read_run(inspect.configuration(str(folder / FILE), [], None)),
        meant_inspection,
    ),
    Target("--set and --mesh", 200, make_options, mutate_options, read_options, meant_options, " "),
    Target("generation settings", 120, make_generation, mutate_generation, read_generation, meant_generation, " "),
]
