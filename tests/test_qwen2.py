"""Qwen2-VL's language model equals transformers', padded rows are the old ones, chats are exact."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from easyanimate_jax.commands import prepare as command
from easyanimate_jax.data.media import write_png
from easyanimate_jax.data.records import Records, read_texts
from easyanimate_jax.models.vae import CausalVAE, VAEConfig
from easyanimate_jax.sharding import MeshConfig, make_mesh, shardings
from easyanimate_jax.text.encode import CHAT, Chat, TextConfig, TextEncoder
from easyanimate_jax.text.qwen2 import Qwen2, Qwen2Config, load_qwen2, read_qwen2_config
from easyanimate_jax.weights import folder as folders
from easyanimate_jax.weights.identity import fingerprint

SIZES = dict(
    vocab_size=270,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    bos_token_id=None,
    eos_token_id=None,
)
ROPE = {"rope_type": "default", "rope_theta": 1e6}
VISION = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=2)
VL = transformers.Qwen2VLConfig(
    text_config={**SIZES, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    vision_config=VISION,
)
PLAIN = transformers.Qwen2Config(**SIZES, rope_parameters=ROPE)
REFERENCES = {
    "Qwen2VLForConditionalGeneration": lambda: transformers.Qwen2VLForConditionalGeneration(VL),
    "Qwen2VLModel": lambda: transformers.Qwen2VLModel(VL),
    "Qwen2VLTextModel": lambda: Qwen2VLTextModel(VL.text_config),
    "Qwen2ForCausalLM": lambda: transformers.Qwen2ForCausalLM(PLAIN),
    "Qwen2Model": lambda: transformers.Qwen2Model(PLAIN),
}

PAD = 256
LENGTHS = np.array([40, 7, 23], np.int32)
MASK = np.arange(40)[None] < LENGTHS[:, None]
IDS = np.where(MASK, np.random.default_rng(0).integers(0, 256, (3, 40)), PAD)

# Of Qwen2-VL-7B-Instruct's tokenizer_config.json.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = [
    "a red circle moves left",
    "红色的圆形在黑色背景上慢慢向右移动",
    "",
    "{braces}, \n lines and <|im_end|> 圆形",
    "a very long sentence about one red circle " * 9,
]

run = jax.jit(lambda model, ids, lengths: model(ids, lengths))


def reference(name="Qwen2VLForConditionalGeneration"):
    """A transformers model whose every weight, norms and biases included, is random."""
    torch.manual_seed(0)
    model = REFERENCES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def penultimate(model, ids, mask, positions=None):
    with torch.no_grad():
        states = model(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask).long(),
            position_ids=positions,
            output_hidden_states=True,
        ).hidden_states
    return states[-2].numpy()


def old_positions(mask):
    """Of text without pictures, in get_rope_index of transformers 4.46."""
    mask = torch.tensor(mask).long()
    positions = mask.cumsum(-1) - 1
    positions.masked_fill_(mask == 0, 1)
    return positions.unsqueeze(0).expand(3, -1, -1)


@pytest.mark.parametrize("name", REFERENCES)
def test_real_tokens_equal_transformers_before_the_last_layer(tmp_path, name):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    expected = penultimate(theirs, IDS, MASK)
    assert 0.3 < expected.std() < 30
    ours = np.asarray(run(load_qwen2(tmp_path), IDS, LENGTHS))
    np.testing.assert_allclose(ours[MASK], expected[MASK], rtol=0, atol=1e-4)


def test_padded_rows_are_those_of_the_old_rule_and_all_alike(tmp_path):
    theirs = reference("Qwen2VLTextModel")
    theirs.save_pretrained(tmp_path)
    ours = np.asarray(run(load_qwen2(tmp_path), IDS, LENGTHS))
    old = penultimate(theirs, IDS, MASK, old_positions(MASK))
    np.testing.assert_allclose(ours, old, rtol=0, atol=1e-4)
    for row, length in zip(ours, LENGTHS, strict=True):
        np.testing.assert_allclose(row[length:], row[-1:].repeat(40 - length, 0), atol=1e-5)
    new = penultimate(theirs, IDS, MASK)
    assert np.abs(new - ours)[~MASK].max() > 0.1  # transformers 5 places padding elsewhere


def before_4_52(config, tensors):
    """The flat config.json of the released folder; its keys are the file's of today."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return {**flat, "torch_dtype": flat.pop("dtype")}, tensors


def version_4_57(config, tensors):
    text = config["text_config"]
    text["rope_scaling"] = text.pop("rope_parameters")
    text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
    return config, tensors


def in_memory(config, tensors):
    def rename(key):
        if key.startswith("model."):
            return key.replace("model.", "model.language_model.", 1)
        return f"model.{key}" if key.startswith("visual.") else key

    return config, {rename(key): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("rewrite", [before_4_52, version_4_57, in_memory])
def test_folders_of_other_versions_hold_the_same_model(tmp_path, rewrite):
    reference().save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    config, tensors = rewrite(config, load_file(tmp_path / "new" / "model.safetensors"))
    assert {"visual", "lm_head"} <= {k.removeprefix("model.").split(".")[0] for k in tensors}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    new, old = load_qwen2(tmp_path / "new"), load_qwen2(tmp_path / "old")
    assert new.config == old.config
    jax.tree.map(np.testing.assert_array_equal, new, old)


def test_the_last_layer_is_not_held(tmp_path):
    reference().save_pretrained(tmp_path)
    model = load_qwen2(tmp_path)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.blocks)} == {3}


RELEASED = {  # Qwen2-VL-7B-Instruct's config.json, flat, without its vision_config
    "model_type": "qwen2_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def test_the_released_model_splits_over_a_mesh(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    config = read_qwen2_config(tmp_path)
    assert (config.head_width, config.rope_theta) == (128, 1e6)
    model = jax.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 6_837_557_760  # 27 layers, words
    placed = shardings(make_mesh(MeshConfig(fsdp=2, context=2, tensor=2)), model)
    held = sum(
        np.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(model), jax.tree.leaves(placed), strict=True)
    )
    assert held < 6_837_557_760 / 8 * 1.1  # the words are not split over `tensor`


def test_every_weight_names_its_axes():
    config = Qwen2Config(270, 32, 48, 4, 4, 2, 1e-6, 1e6)
    model = jax.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0)))
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    for path, p in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_variable):
        assert len(p.out_sharding) == p.get_value().ndim, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_real_tokens_equal_transformers_at_the_released_width(tmp_path):
    sizes = SIZES | {n: RELEASED[n] for n in ("hidden_size", "intermediate_size")}
    sizes |= {"num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 3}
    rope = {**ROPE, "mrope_section": [16, 24, 24]}
    config = transformers.Qwen2VLConfig(
        text_config={**sizes, "rope_parameters": rope}, vision_config=VISION | {"hidden_size": 3584}
    )
    torch.manual_seed(0)
    theirs = Qwen2VLTextModel(config.text_config).eval()
    theirs.save_pretrained(tmp_path)
    lengths = np.array([256, 100], np.int32)
    mask = np.arange(256)[None] < lengths[:, None]
    ids = np.where(mask, np.random.default_rng(0).integers(0, 256, (2, 256)), PAD)
    expected = penultimate(theirs, ids, mask, old_positions(mask))
    ours = np.asarray(run(load_qwen2(tmp_path), ids, lengths))
    print(f"max abs error {np.abs(ours - expected).max():.1e}, states' std {expected.std():.2f}")
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A V5.1 folder: a model and a tokenizer of bytes, as transformers writes them."""
    out = tmp_path_factory.mktemp("v51")
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "he", "el", "hel", "circ"]
    vocabulary |= {token: PAD + i for i, token in enumerate(special)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[("h", "e"), ("he", "l")],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",  # as in the released folder
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out / "tokenizer")
    reference().save_pretrained(out / "text_encoder")
    return out


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder.load(folder)


def diffusers_tokens(folder, prompts):
    """Ids and mask as diffusers' EasyAnimatePipeline makes them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    chats = [[{"role": "user", "content": [{"type": "text", "text": p}]}] for p in prompts]
    text = [
        tokenizer.apply_chat_template([m], tokenize=False, add_generation_prompt=True)
        for (m,) in chats
    ]
    assert text == [CHAT.format(prompt) for prompt in prompts]
    tokens = tokenizer(
        text=text,
        padding="max_length",
        max_length=256,
        truncation=True,
        padding_side="right",
        return_tensors="np",
    )
    return tokens["input_ids"], tokens["attention_mask"].astype(bool)


def test_every_prompt_is_the_chat_of_the_tokenizers_template(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids, mask = diffusers_tokens(folder, PROMPTS)
    ours, lengths = Chat(tokenizer, 256)(PROMPTS)
    np.testing.assert_array_equal(ours, ids)
    np.testing.assert_array_equal(lengths, mask.sum(1))
    short, _ = Chat(tokenizer, 256)(PROMPTS[:3])
    np.testing.assert_array_equal(short, ids[:3, : short.shape[1]])
    assert (ids[:3, short.shape[1] - 1 :] == PAD).all() and short.shape[1] in (128, 192)


def test_a_chat_always_ends_in_a_row_of_padding_that_stands_for_the_rest(folder, encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    chat = Chat(tokenizer, 256)
    full = "b" * (128 - chat.num_tokens(""))
    ids, lengths = chat([full])
    assert lengths == [128] and ids.shape == (1, 192)
    ids, mask = diffusers_tokens(folder, [full])
    expected = penultimate(reference(), ids, mask, old_positions(mask))
    np.testing.assert_allclose(encoder.encode([full])[0], expected, rtol=0, atol=1e-4)


def test_a_long_prompt_loses_the_closing_turn(folder, encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, lengths = Chat(tokenizer, 256)([PROMPTS[0], PROMPTS[-1]])
    assert lengths[0] < lengths[1] == 256
    assert [(row == end).sum() for row in ids] == [2, 1]  # of the system's turn alone
    assert [encoder.is_cut(prompt) for prompt in (PROMPTS[0], PROMPTS[-1], None)] == [
        False,
        True,
        False,
    ]


def test_encoded_prompts_equal_transformers_in_both_languages(folder, encoder):
    assert encoder.config == TextConfig(lengths=(256,), widths=(32,))
    ids, mask = diffusers_tokens(folder, PROMPTS)
    theirs = reference()
    (all_states,) = encoder.encode(PROMPTS)
    (short_states,) = encoder.encode(PROMPTS[:3])
    expected = penultimate(theirs, ids, mask, old_positions(mask))
    np.testing.assert_allclose(all_states, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(short_states, expected[:3], rtol=0, atol=1e-4)
    today = penultimate(theirs, ids, mask)
    np.testing.assert_allclose(all_states[mask], today[mask], rtol=0, atol=1e-4)


def test_no_negative_prompt_is_the_empty_one(encoder):
    (none, empty) = encoder.encode([None, ""])[0]
    np.testing.assert_array_equal(none, empty)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=2, context=2, tensor=2), MeshConfig(fsdp=1, tensor=8)]
)
def test_eight_devices_encode_like_one(folder, encoder, mesh, capfd):
    """Also where the tensor axis is wider than the four heads and their two keys."""
    with jax.set_mesh(make_mesh(mesh)):
        sharded = TextEncoder.load(folder)
        (states,) = sharded.encode(PROMPTS)
    assert "rematerialization" not in capfd.readouterr().err  # XLA's word for a bad resharding
    np.testing.assert_allclose(states, encoder.encode(PROMPTS)[0], rtol=0, atol=1e-5)
    (model,) = sharded._encoders
    for name in ("q", "k", "v", "out", "gate", "up", "down"):
        kernel = getattr(model.blocks, name).kernel.get_value()
        split = mesh.fsdp * mesh.context * mesh.tensor
        assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * split == kernel.size, name


def copied(folder, out, **changes):
    shutil.copytree(folder, out)
    path = out / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


def test_a_bfloat16_folder_is_held_and_run_in_bfloat16(folder, encoder, tmp_path):
    half = TextEncoder.load(copied(folder, tmp_path / "half", dtype="bfloat16"))
    (model,) = half._encoders
    assert model.blocks.q.kernel.dtype == model.words.embedding.dtype == "bfloat16"
    assert model.blocks.mlp_norm.scale.dtype == "float32"
    (states,), (exact,) = half.encode(PROMPTS), encoder.encode(PROMPTS)
    assert states.dtype == np.float32
    assert 0 < np.abs(states - exact).max() < 0.1 * np.abs(exact).max()


def test_other_merges_are_another_folder(folder, tmp_path):
    other = copied(folder, tmp_path / "other")
    before = fingerprint(other)
    (other / "tokenizer" / "merges.txt").write_text("h e")
    assert fingerprint(other) != before


CONFIG = """
from dataclasses import replace
from configs.demo import config as demo
from easyanimate_jax.runs.config import SampleConfig
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet

config = replace(
    demo,
    source="{source}",
    prepared="{out}",
    vae="{vae}",
    text="{text}",
    sets=(LatentSet("image", Budget(4, (4,), (32,), frames=1), kinds=("image",)),),
    stages=demo.stages[:1],
    samples=SampleConfig(("红色的圆形",)),
)
"""


def test_the_prepare_command_takes_a_v51_folder(folder, encoder, tmp_path, monkeypatch):
    config = VAEConfig(channels=(8, 8, 8), layers=1, groups=4, unshuffle=4, dtype="float32")
    vae = CausalVAE(config, rngs=nnx.Rngs(0))
    monkeypatch.setattr(folders, "load_vae", lambda folder: vae)
    rows = [{"file_path": f"{i}.png", "text": text} for i, text in enumerate(PROMPTS) if text]
    (tmp_path / "source").mkdir()
    for row in rows:
        picture = np.full((40, 40, 3), len(row["text"]) % 256, np.uint8)
        write_png(tmp_path / "source" / row["file_path"], picture)
    (tmp_path / "source" / "metadata.json").write_text(json.dumps(rows))
    places = {name: tmp_path / name for name in ("source", "out", "vae")}
    (tmp_path / "config.py").write_text(CONFIG.format(**places, text=folder))
    assert command.main([str(tmp_path / "config.py")]) == 0
    records = Records(tmp_path / "out" / "image")
    assert len(records) == 4
    for i, clip in enumerate(records.index["clip"]):
        (expected,) = encoder.encode([PROMPTS[int(clip[0])]])
        np.testing.assert_allclose(records[i]["text0"], expected, rtol=1e-3, atol=1e-3)
    (shown,) = read_texts(tmp_path / "out" / "prompts.safetensors")
    np.testing.assert_allclose(shown, encoder.encode(["红色的圆形"])[0], rtol=1e-3, atol=1e-3)


ROPELESS = {"text_config": {k: v for k, v in SIZES.items() if k != "rms_norm_eps"}}
REFUSED = [
    ({"model_type": "llama"}, r"model_type 'llama'; give a folder of one of bert"),
    (ROPELESS, r"config.json has no rms_norm_eps, rope_theta"),
    ({"text_config": SIZES | {"rope_scaling": {"type": "yarn"}}}, "asks for 'yarn' rotary"),
    ({"text_config": SIZES | ROPE | {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
    ({"text_config": SIZES | ROPE | {"use_sliding_window": True}}, "use_sliding_window is True"),
    ({"text_config": SIZES | ROPE | {"num_key_value_heads": 3}}, "4 heads cannot share 3 keys"),
    ({"text_config": SIZES | ROPE | {"num_attention_heads": 5}}, "does not split into 5 heads"),
    ({"text_config": SIZES | ROPE | {"num_hidden_layers": 1}}, "want 2 or more"),
    ({"text_config": SIZES | ROPE | {"num_hidden_layers": 3}}, "12 tensors that are not Qwen2's"),
    ({"text_config": SIZES | ROPE | {"num_hidden_layers": 6}}, "layers.4.*is missing"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_not_qwen2_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder.load(copied(folder, tmp_path / "other", **changes))


def test_a_foreign_tokenizer_and_lengths_that_do_not_fit_are_refused(folder, tmp_path):
    other = copied(folder, tmp_path / "other")
    (other / "text.json").write_text('{"lengths": [77, 256]}')
    with pytest.raises(ValueError, match=r"gives lengths \[77, 256\] to 1 encoders"):
        TextEncoder.load(other)
    (other / "text.json").write_text('{"lengths": [100]}')
    assert TextEncoder.load(other).encode(["a"])[0].shape == (1, 100, 32)
    with pytest.raises(ValueError, match=r"lacks <\|im_end\|>, <\|im_start\|>; give the one of"):
        Chat(transformers.Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[]), 256)
