"""GGUF files, written from golden models in the way of llama.cpp's converter."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hf.hf_cases import GOLDEN, TOKENS, permute, write_gguf
from safetensors.numpy import load_file

import dms_jax
from dms_jax.errors import ConfigError
from dms_jax.hf.gguf.gguf_file import GGUFTensors, unpermute


@pytest.mark.parametrize("name", ["llama_untied", "qwen2_qkv_bias", "qwen3_qk_norm"])
def test_logits_equal_those_of_transformers(tmp_path, name):
    model = dms_jax.load(write_gguf(tmp_path / "m.gguf", name))
    want = load_file(GOLDEN / name / "tensors.safetensors")
    np.testing.assert_allclose(model.dense(jnp.asarray(want["input_ids"], jnp.int32)), want["logits"], atol=1e-4)
    assert model.config.tie_word_embeddings == dms_jax.load(GOLDEN / name).config.tie_word_embeddings
    # Negative control: without undoing the row order of Q and K, the error would be far above the tolerance.
    if name == "llama_untied":
        rows = load_file(GOLDEN / name / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
        assert abs(permute(rows, 4) - rows).max() > 0.1 and np.array_equal(unpermute(permute(rows, 4), 4), rows)


def test_slices_equal_slices_of_the_whole_for_quantized_and_permuted_tensors(tmp_path):
    tensors = GGUFTensors(str(write_gguf(tmp_path / "m.gguf", "llama_untied", quantize=gguf.GGMLQuantizationType.Q8_0)))
    for name in (
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
    ):
        whole = tensors.read(name)
        assert whole.shape == tensors.shape(name)
        np.testing.assert_array_equal(tensors.read(name, (slice(12, 24), slice(8, 16))), whole[12:24, 8:16])
    original = load_file(GOLDEN / "llama_untied" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    read = tensors.read("model.layers.1.mlp.down_proj.weight")
    assert 0 < abs(read - original).max() < 0.01 * abs(original).max()


def test_tied_matrix_stored_twice_keeps_the_finer_copy(tmp_path):
    def doubled(tensors):
        embed = tensors["model.embed_tokens.weight"]
        return tensors | {
            "model.embed_tokens.weight": embed
            + 0.01 * np.random.default_rng(0).standard_normal(embed.shape).astype(np.float32),
            "lm_head.weight": embed,
        }

    coarse = lambda tensors: {
        k: v.astype(np.float16) if k == "model.embed_tokens.weight" else v for k, v in doubled(tensors).items()
    }
    model = dms_jax.load(write_gguf(tmp_path / "m.gguf", "qwen3_qk_norm", edit=coarse))
    assert model.config.tie_word_embeddings
    np.testing.assert_array_equal(
        model.embed[...], load_file(GOLDEN / "qwen3_qk_norm" / "model.safetensors")["model.embed_tokens.weight"]
    )


def test_conversion_writes_a_folder_with_the_same_weights_and_a_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama_untied", tokenizer="smollm")
    dms_jax.save(dms_jax.load(path), tmp_path / "out")
    assert {k: v.tobytes() for k, v in load_file(tmp_path / "out" / "model.safetensors").items()} == {
        k: v.tobytes() for k, v in load_file(GOLDEN / "llama_untied" / "model.safetensors").items()
    }
    assert dms_jax.load(tmp_path / "out").config == dms_jax.load(path).config
    assert dms_jax.base_hash(dms_jax.load(path)) == dms_jax.base_hash(dms_jax.load(tmp_path / "out"))
    from_file, from_folder = dms_jax.load_tokenizer(path), dms_jax.load_tokenizer(tmp_path / "out")
    assert from_file.hash == from_folder.hash
    ids = from_file.encode("ab ab12")
    assert [TOKENS[i] for i in ids] == ["ab", "Ġab", "1", "2"] and from_file.decode(ids) == "ab ab12"
    assert from_file.encode_chat([{"role": "user", "content": "ab"}]).tolist() == [0, TOKENS.index("ab")]
    assert from_file.eos_id == 1


def test_llama3_tokenizer_adds_its_bos(tmp_path):
    tokenizer = dms_jax.load_tokenizer(write_gguf(tmp_path / "m.gguf", "llama_untied", tokenizer="llama-bpe"))
    assert [TOKENS[i] for i in tokenizer.encode("ab")] == ["ab"]
    assert tokenizer.add_bos and TOKENS[tokenizer.bos_id] == "<s>"


def test_unknown_tokenizer_is_dropped_with_a_warning(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama_untied", tokenizer="martian")
    with pytest.raises(ConfigError, match="martian.*smollm, gpt-2"):
        dms_jax.load_tokenizer(path)
    with pytest.warns(UserWarning, match="martian"):
        dms_jax.save(dms_jax.load(path), tmp_path / "out")
    assert dms_jax.load(tmp_path / "out").config.model_type == "llama"


def test_damaged_files_and_unsupported_architectures_give_one_line(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama_untied")
    whole = path.read_bytes()
    for content in (
        b"",
        b"GGUF",
        b"not a model at all, but long enough to be read",
        whole[:200],
        whole[: len(whole) // 2],
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"m\.gguf") as refusal:
            dms_jax.load(path)
        assert "\n" not in str(refusal.value)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="gemma3.*llama, qwen2, qwen3"):
        dms_jax.load(path)


def test_missing_fields_and_tensors_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"llama\.context_length"):
        dms_jax.load(write_gguf(tmp_path / "a.gguf", "llama_untied", skip_fields=["context_length"]))
    short = lambda tensors: {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(ConfigError, match=r"1 tensors.* model\.layers\.1\.mlp\.up_proj\.weight"):
        dms_jax.load(write_gguf(tmp_path / "b.gguf", "llama_untied", edit=short))
