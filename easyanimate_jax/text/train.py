"""Train small text encoders on captions alone, and write them in the layout of V5.

    python -m easyanimate_jax text SOURCE OUT

SOURCE holds a metadata.json whose files may have captions in several languages. The vocabularies
are the words of the captions and single characters. The encoders learn two things: every state
predicts the words of its file's captions, and captions of the same file get similar states
(a contrastive loss), so that languages agree.
"""

import functools
import json
import logging
import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from easyanimate_jax.storage.local import local_path
from easyanimate_jax.storage.lock import FolderLock
from easyanimate_jax.storage.whole import replace_text
from easyanimate_jax.text.bert import Bert, BertConfig, save_bert
from easyanimate_jax.text.encode import token_ids
from easyanimate_jax.text.t5 import T5, T5Config, save_t5
from easyanimate_jax.text.train_config import TextTrainConfig

logger = logging.getLogger(__name__)

CHARACTERS = string.ascii_lowercase + string.digits + ".,;:!?'-"
SINGLE = Regex("[\u4e00-\u9fff]|[.,:;!?，。：；！？、]")  # each is a piece of its own


def read_captions(source: Path) -> list[tuple[str, ...]]:
    """Return the captions of each file of a metadata.json, sorted; equal tuples appear once.

    Raises ValueError if the file is missing.
    """
    path = source / "metadata.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a folder that has captions in a metadata.json")
    files = defaultdict(list)
    for row in json.loads(path.read_text("utf-8")):
        files[row["file_path"]].append(row["text"])
    return sorted({tuple(captions) for captions in files.values()})


def word_tokenizer(captions: Sequence[str]) -> BertTokenizer:
    """Return Bert's WordPiece tokenizer; its vocabulary is the captions' words and characters."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word
        for caption in captions
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    )
    letters = [*CHARACTERS, *(f"##{character}" for character in CHARACTERS)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = dict.fromkeys([*special, *letters, *sorted(words)])
    return BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})


def piece_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer like T5's; its pieces are the captions' words and characters.

    The trainer of Unigram needs a large corpus; from few sentences it learns parts of words.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(SINGLE, "isolated")]
    )
    words = Counter(
        word
        for caption in captions
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(caption)
        )
    )
    total = sum(words.values())
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = {character: -20.0 for character in ["▁", *CHARACTERS]}
    pieces |= {word: float(np.log(count / total)) for word, count in sorted(words.items())}
    tokenizer.model = models.Unigram([*special, *pieces.items()], unk_id=2)
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class Learner(nnx.Module):
    """An encoder with a linear head that predicts a file's words from each single state."""

    def __init__(self, encoder: Bert | T5, *, rngs: nnx.Rngs):
        self.encoder = encoder
        self.head = nnx.Linear(*encoder.words.embedding.shape[::-1], rngs=rngs)


def pair_loss(
    learner: Learner,
    pairs: Int[Array, "B 2 L"],
    words: Float[Array, "B V"],
    places: Int[Array, "P"],
    *,
    telling: float,
    temperature: float,
) -> Float[Array, ""]:
    """Return the loss: each state predicts the words of both captions, and paired states match.

    `words` comes from `multi_hot`. Only the states at `places` predict words, and `telling` is the
    weight of this part. The contrastive part compares each position with the same position of the
    other caption, after it subtracts their mean over the batch: with thousands of words, untrained
    states are nearly equal, and without this step they stay so. It includes padding, because the
    diffusion transformer reads padding too. A file's languages then give it the same states. When
    each state predicted only its own word, the transformer had to learn every word at every
    position and in every language.
    """
    states = learner.encoder(rearrange(pairs, "B two L -> (B two) L"))
    logits = rearrange(learner.head(states[:, places]), "(B two) P V -> B two P V", two=2)
    told = optax.sigmoid_binary_cross_entropy(logits, words[:, None, None]).sum(-1).mean()

    states = states - states.mean(axis=0, keepdims=True)
    states = states / jnp.linalg.norm(states, axis=-1, keepdims=True)
    first, second = rearrange(states, "(B two) L D -> two L B D", two=2)
    similarity = jnp.einsum("LBD,LCD->LBC", first, second) / temperature
    files = jnp.broadcast_to(jnp.arange(len(pairs)), similarity.shape[:2])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    finding = cross_entropy(similarity, files) + cross_entropy(similarity.swapaxes(1, 2), files)
    return telling * told + finding.mean() / 2


def multi_hot(
    pairs: Int[np.ndarray, "files 2 L"], vocabulary: int, special: Sequence[int]
) -> Float[np.ndarray, "files V"]:
    """Return 1 for each token in either caption of a file, else 0; special tokens get 0."""
    words = np.zeros((len(pairs), vocabulary), np.float32)
    np.put_along_axis(words, pairs.reshape(len(pairs), -1), 1, axis=1)
    words[:, list(special)] = 0
    return words


class Pairs:
    """Random pairs of captions of the same file, as token ids."""

    def __init__(self, files: Sequence[tuple[str, ...]], tokenizer, length: int, seed: int):
        captions = [caption for file in files for caption in file]
        self.ids = token_ids(tokenizer, captions, length)
        self.counts = np.array([len(file) for file in files])
        self.begins = np.cumsum(self.counts) - self.counts
        self.rng, self.captions_rng = np.random.default_rng(seed), np.random.default_rng((seed, 1))

    def draw(self, count: int) -> Int[np.ndarray, "count 2 L"]:
        """Return pairs of `count` files; a file with one caption gives it twice."""
        files = len(self.counts)
        rows = self.rng.choice(files, count, replace=files < count)
        counts = self.counts[rows]
        first, step = (self.captions_rng.random((2, count)) * [counts, counts - 1]).astype(int)
        chosen = np.sort([first, (first + 1 + step) % counts], axis=0)
        return self.ids[self.begins[rows, None] + chosen.T]


def train_encoder(encoder: Bert | T5, tokenizer, pairs: Pairs, config: TextTrainConfig):
    """Train `encoder` for `config.steps` steps of AdamW on random caption pairs; return it."""
    learner = Learner(encoder, rngs=nnx.Rngs(config.seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, config.steps // 10, config.steps
    )
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    weights = {"telling": config.telling, "temperature": config.temperature}
    loss = functools.partial(pair_loss, **weights)

    @jax.jit
    def step(learner, opt_state, pairs, words, places):
        value, grads = jax.value_and_grad(loss)(learner, pairs, words, places)
        updates, opt_state = optimizer.update(grads, opt_state, learner)
        return optax.apply_updates(learner, updates), opt_state, value

    opt_state, rng = optimizer.init(learner), np.random.default_rng((config.seed, 2))
    length = pairs.ids.shape[1]
    for i in range(config.steps):
        drawn = pairs.draw(config.batch)
        words = multi_hot(drawn, len(tokenizer), tokenizer.all_special_ids)
        places = np.sort(rng.permutation(length)[: config.places])
        learner, opt_state, value = step(learner, opt_state, drawn, words, places)
        if (i + 1) % 50 == 0:
            name = type(encoder).__name__
            logger.info(f"{name} step {i + 1}/{config.steps} loss {value:.3f}")
    return learner.encoder


def train(source: Path, out: Path, config: TextTrainConfig) -> None:
    """Write tokenizer, text_encoder, tokenizer_2, text_encoder_2 and text.json into `out`.

    Nothing is written before all encoders are trained. Raises ValueError if another process
    writes there.
    """
    source, out = local_path(source), local_path(out)
    files = read_captions(source)
    with FolderLock(out, option="OUT") as lock:
        trained = list(_trained(files, config))
        lock.begun = True
        for suffix, tokenizer, encoder, save in trained:
            tokenizer.save_pretrained(out / f"tokenizer{suffix}")
            save(encoder, out / f"text_encoder{suffix}")
        lengths = [tokenizer.model_max_length for _, tokenizer, _, _ in trained]
        replace_text(out / "text.json", json.dumps({"lengths": lengths}))


def _trained(files: list[tuple[str, ...]], config: TextTrainConfig) -> Iterator[tuple]:
    """Yield (suffix of its folders, tokenizer, encoder, function that saves it) for each."""
    captions = [caption for captions in files for caption in captions]
    first, second = ("", word_tokenizer, bert, save_bert), ("_2", piece_tokenizer, t5, save_t5)
    for suffix, make_tokenizer, make_encoder, save in (first, second)[: 1 + config.second]:
        tokenizer = make_tokenizer(captions)
        length = max(len(ids) for ids in tokenizer(captions)["input_ids"])
        length = -(-length // 4) * 4
        tokenizer.model_max_length = length
        encoder = make_encoder(len(tokenizer), length, config)
        pairs = Pairs(files, tokenizer, length, config.seed)
        encoder = train_encoder(encoder, tokenizer, pairs, config)
        yield suffix, tokenizer, encoder, save


def bert(vocabulary: int, length: int, config: TextTrainConfig) -> Bert:
    """Return an untrained Bert for `vocabulary` tokens and prompts of `length` tokens."""
    sizes = BertConfig(
        vocab_size=vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=2 * config.width,
        max_position_embeddings=length,
    )
    return Bert(sizes, rngs=nnx.Rngs(config.seed))


def t5(vocabulary: int, length: int, config: TextTrainConfig) -> T5:
    """Return an untrained T5 encoder for `vocabulary` tokens; it has no limit of `length`."""
    sizes = T5Config(
        vocab_size=vocabulary,
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.width,
        num_layers=config.layers,
        num_heads=config.heads,
    )
    return T5(sizes, rngs=nnx.Rngs(config.seed))
