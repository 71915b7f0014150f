"""The levels of the package, to which test_import_layers.py holds the code and which CONTRIBUTING.md lists."""

# The folders and flat modules of dms_jax, one level per line. A module may import from the lines above its own and from
# its own folder. On the first line, the modules may also import each other.
LEVELS = [
    "axes errors files chat_records config_reader config device_guard sharding platform_defaults command provenance "
    "writer_lock",
    "core",
    "kernels policies",
    "models",
    "hf checkpoint",
    "engine planning tasks",
    "evaluation",
    "training reporting",
    "commands",
    "__main__",
]
