"""The weight table in both directions, the order and size of reads, and the refusal of wrong folders."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dms_jax
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.errors import ConfigError
from dms_jax.hf import hf_weights, safetensors_files
from dms_jax.hf.safetensors_files import SafetensorsFiles, open_folder
from dms_jax.models.decoder import Decoder
from dms_jax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "model.safetensors").is_file())
# A model with every parameter that the decoder can have, and with distinct sizes where possible.
EVERYTHING = ModelConfig(
    "llama",
    40,
    48,
    32,
    3,
    8,
    4,
    6,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
    dms=DMSConfig(head_units=10),
)


def randomized(model: Decoder) -> Decoder:
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return nnx.merge(
        graph, tree.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])
    )


class InMemory:
    """The `Tensors` of a dict under Hugging Face names."""

    where = "memory"

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name, index=()):
        return self.tensors[name][index]


def state_arrays(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.parametrize("mesh", [None, (4, 2), (8, 1), (2, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_export_then_import_gives_the_same_bits_for_every_parameter_on_every_mesh(mesh, dtype):
    model = randomized(Decoder(EVERYTHING, rngs=nnx.Rngs(0), dtype=dtype))
    tensors = InMemory({w.name: w.value() for w in hf_weights.model_writes(model)})
    again = hf_weights.read_model(
        tensors, EVERYTHING, jnp.dtype(dtype), mesh and make_mesh(*mesh), fresh_evict_head=False
    )
    for got, want in zip(state_arrays(again), state_arrays(model), strict=True):
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes()


def test_table_equals_hand_written_transposes():
    """One tensor of each kind is compared by index; a round trip would not notice a table that is wrong both ways."""
    model = randomized(Decoder(EVERYTHING, rngs=nnx.Rngs(0)))
    file = {w.name: w.value() for w in hf_weights.model_writes(model)}
    attention, mlp = model.layers.attention, model.layers.mlp
    tensor = lambda name: file[f"model.layers.1.{name}"]
    head, channel, d, f = 5, 2, 7, 11
    assert tensor("self_attn.q_proj.weight")[head * 6 + channel, d] == attention.q[...][1, d, head, channel]
    assert tensor("self_attn.k_proj.weight")[3 * 6 + channel, d] == attention.k[...][1, d, 3, channel]
    assert tensor("self_attn.o_proj.weight")[d, head * 6 + channel] == attention.o[...][1, head, channel, d]
    assert tensor("self_attn.q_proj.bias")[head * 6 + channel] == attention.q_bias[...][1, head, channel]
    assert tensor("self_attn.dms_proj_alpha.weight")[3, d] == attention.evict_proj[...][1, d, 3]
    assert tensor("self_attn.dms_proj_alpha_units_in.weight")[9, d] == attention.evict_units_in[...][1, d, 9]
    assert tensor("self_attn.dms_proj_alpha_units_in.bias")[9] == attention.evict_units_bias[...][1, 9]
    assert tensor("self_attn.dms_proj_alpha_units_out.weight")[3, 9] == attention.evict_units_out[...][1, 9, 3]
    assert tensor("mlp.gate_proj.weight")[f, d] == mlp.gate[...][1, d, f]
    assert tensor("mlp.down_proj.weight")[d, f] == mlp.down[...][1, f, d]
    assert file["lm_head.weight"][9, d] == model.head[...][9, d]


@pytest.mark.parametrize("name", FOLDERS)
def test_real_folder_exports_exactly_its_own_tensors(name):
    want = load_file(GOLDEN / name / "model.safetensors")
    got = {w.name: w.value() for w in hf_weights.model_writes(dms_jax.load(GOLDEN / name))}
    assert got.keys() == want.keys()
    for tensor in want:
        assert got[tensor].dtype == want[tensor].dtype and got[tensor].tobytes() == want[tensor].tobytes()


def test_each_byte_is_read_once_and_only_a_shard_at_a_time(monkeypatch):
    """On 8 devices, each read is at most 1/8 of a tensor, and each host block at most 1/8 of a stacked parameter."""
    reads, blocks = [], []
    read, put = SafetensorsFiles.read, jax.device_put

    def counted_read(self, name, index=()):
        value = read(self, name, index)
        reads.append((name, value.nbytes))
        return value

    def counted_put(value, *arguments, **keywords):
        if isinstance(value, np.ndarray):
            blocks.append(value.nbytes)
        return put(value, *arguments, **keywords)

    monkeypatch.setattr(SafetensorsFiles, "read", counted_read)
    monkeypatch.setattr(hf_weights.jax, "device_put", counted_put)
    model = dms_jax.load(GOLDEN / "qwen3_qk_norm", mesh=make_mesh(8, 1))
    monkeypatch.undo()
    on_disk = {name: value.nbytes for name, value in load_file(GOLDEN / "qwen3_qk_norm" / "model.safetensors").items()}
    assert sum(size for _, size in reads) == sum(on_disk.values())
    assert all(
        size * 8 <= on_disk[name] for name, size in reads if on_disk[name] > 64
    )  # the 64 byte norms [H] are replicated
    assert max(blocks) * 8 <= max(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert model.layers.mlp.gate[...].sharding.spec == jax.sharding.PartitionSpec(None, "data", "model")


def test_sharded_model_computes_the_same_logits():
    tokens = jnp.arange(20)[None] % 131
    alone, meshed = dms_jax.load(GOLDEN / "mistral"), dms_jax.load(GOLDEN / "mistral", mesh=make_mesh(4, 2))
    np.testing.assert_allclose(meshed.dense(tokens), alone.dense(tokens), atol=1e-5)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_source_is_widened_exactly_and_the_evict_head_stays_fp32(tmp_path, dtype):
    folder = copy(tmp_path, "qwen3_dms_projection_per_head")
    narrow = edit(folder, lambda tensors: {name: value.astype(dtype) for name, value in tensors.items()})
    model = dms_jax.load(folder)
    np.testing.assert_array_equal(model.embed[...], narrow["model.embed_tokens.weight"].astype(np.float32))
    low = dms_jax.load(folder, dtype=jnp.bfloat16)
    assert low.embed[...].dtype == jnp.bfloat16 and low.layers.attention.evict_proj[...].dtype == jnp.float32
    np.testing.assert_array_equal(low.layers.attention.evict_proj[...], model.layers.attention.evict_proj[...])


def copy(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    (folder / "tensors.safetensors").unlink()
    return folder


def edit(folder: Path, change) -> dict:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def reshaped(name, shape):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    "change, words",
    [
        (without("model.layers.1.mlp.up_proj.weight"), r"1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            reshaped("model.layers.0.self_attn.q_proj.bias", (64,)),
            r"1 tensors.*model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (reshaped("model.layers.2.self_attn.q_proj.weight", (64, 48)), r"model\.layers\.2\.self_attn\.q_proj\.weight"),
        (
            reshaped("model.layers.0.mlp.up_proj.weight", (95, 48)),
            r"model\.layers\.0\.mlp\.up_proj\.weight.*\[96, 48\].*\[95, 48\]",
        ),
        (
            reshaped("model.embed_tokens.weight", (160, 48)),
            r"\[160, 48\].*vocab_size in config.json to 160",
        ),
        (reshaped("lm_head.weight", (131, 48)), "tie_word_embeddings.*lm_head.weight"),
        (reshaped("model.layers.0.self_attn.dms_proj_alpha.weight", (2, 48)), "dms_separate_alpha"),
        (lambda tensors: {f"base.{key}": value for key, value in tensors.items()}, "base.model"),
        (
            lambda tensors: tensors | {"model.norm.weight": np.zeros(48, ml_dtypes.float8_e4m3fn)},
            "model.norm.weight.*BF16.*F8_E4M3",
        ),
    ],
)
def test_wrong_tensors_are_named_in_one_line(tmp_path, change, words):
    folder = copy(tmp_path, "qwen3_qk_norm")
    edit(folder, change)
    with pytest.raises(ConfigError, match=words) as refusal:
        dms_jax.load(folder)
    assert "\n" not in str(refusal.value)


def test_missing_head_suggests_tying(tmp_path):
    folder = copy(tmp_path, "llama_untied")
    edit(folder, without("lm_head.weight"))
    with pytest.raises(ConfigError, match="lm_head.weight; .*tie_word_embeddings"):
        dms_jax.load(folder)


def test_equal_copy_of_the_tied_matrix_and_rotary_buffers_are_harmless(tmp_path):
    folder = copy(tmp_path, "qwen3_qk_norm")
    edit(
        folder,
        lambda t: (
            t
            | {
                "lm_head.weight": t["model.embed_tokens.weight"].copy(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
            }
        ),
    )
    np.testing.assert_array_equal(dms_jax.load(folder).embed[...], dms_jax.load(GOLDEN / "qwen3_qk_norm").embed[...])


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "0 bytes"),
        (b"\x00" * 4, "damaged"),
        (b"\xff" * 64, "damaged"),
        (b"\x10" + b"\x00" * 7 + b"{not json at all", "damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, words):
    folder = copy(tmp_path, "mistral")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=f"model.safetensors.*{words}"):
        dms_jax.load(folder)


def test_truncated_file_is_refused(tmp_path):
    folder = copy(tmp_path, "mistral")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="model.safetensors"):
        dms_jax.load(folder)


def test_index_that_does_not_fit_its_files_is_refused(tmp_path):
    folder = copy(tmp_path, "mistral")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = list(open_names(folder / "model-00001-of-00002.safetensors"))
    index = folder / "model.safetensors.index.json"

    def load_with(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        return dms_jax.load(folder)

    first = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors"):
        load_with(first | {names[0]: "model-00002-of-00002.safetensors"})
    with pytest.raises(ConfigError, match="model.nothing"):
        load_with(first | {"model.nothing": "model-00001-of-00002.safetensors"})
    with pytest.raises(ConfigError, match="weight_map"):
        load_with({})
    assert load_with(first).config.model_type == "mistral"
    index.unlink()
    with pytest.raises(ConfigError, match="model.safetensors.*model-00001-of-00002"):
        dms_jax.load(folder)


def open_names(path: Path):
    return SafetensorsFiles(str(path), [str(path)]).names()


def test_open_folder_reads_slices():
    tensors, whole = open_folder(str(GOLDEN / "mistral")), load_file(GOLDEN / "mistral" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(tensors.read(name, (slice(3, 9), slice(5, 6))), whole[name][3:9, 5:6])
    np.testing.assert_array_equal(tensors.read("model.norm.weight", (slice(3, 9),)), whole["model.norm.weight"][3:9])


def test_transposed_array_is_written_in_its_logical_order(tmp_path):
    """The `save_file` of the library silently writes the memory of a transposed array."""
    value = np.arange(12, dtype=np.float32).reshape(3, 4).T
    safetensors_files.save_file(str(tmp_path / "x.safetensors"), {"x": value}, {})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["x"], value)
