"""Our Bert and T5 equal transformers'; prompts become states that the demo can learn from."""

import jax
import numpy as np
import pytest
import torch
import transformers

from easyanimate_jax.text.bert import load_bert, save_bert
from easyanimate_jax.text.t5 import load_t5, relative_buckets, save_t5

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
