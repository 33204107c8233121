"""Read and write TensorFlow Datasets in ArrayRecord; reading does not use TensorFlow's runtime.

`write_tfds` writes a data set from any source: the files unchanged, names, captions. In other data
sets, the first feature of FILES holds the encoded picture or video, and the first of TEXTS the
caption. A class label is replaced by its name.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from easyanimate_jax.data.media import Example
from easyanimate_jax.data.sources.rows import Problem, Row
from easyanimate_jax.storage.stores import Place

FILES = ("file", "video", "image")
TEXTS = ("captions", "caption", "text", "title", "label")


def rows(folder: Path) -> Iterator[Row | Problem]:
    """Yield a row for each caption of each example, from the split "train" or the first split.

    An example that cannot be read yields a `Problem`. Raises ValueError for an unreadable data set.
    """
    examples, features, split, file, text = _open(folder)
    for i in range(len(examples)):
        try:
            example = examples[i]
        except (ValueError, RuntimeError, KeyError) as error:
            yield Problem(i, "", f"the example cannot be read: {error}")
            continue
        name = _text(example["name"]) if "name" in features else f"{split}-{i:08d}"
        if not isinstance(example[file], bytes):
            yield Problem(i, name, f"feature {file!r} is not an encoded file")
            continue
        for caption in _captions(features[text], example[text]):
            yield Row(i, name, caption, file=Example(examples, i, file, name, folder))


def example(folder: Path, index: int, field: str, name: str) -> Example:
    """Return the example's file from the values that `rows` stored; the data set stays open."""
    return Example(_examples(folder), index, field, name, folder)


def write_tfds(clips: Sequence, folder: Path, name: str = "captioned_clips") -> Path:
    """Write the clips (`sources.Clip`) as a TFDS data set in ArrayRecord; return its folder."""
    import tensorflow_datasets as tfds

    class CaptionedClips(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = tfds.features.FeaturesDict(
                {
                    "name": text,
                    "kind": text,
                    "captions": tfds.features.Sequence(text),
                    "file": tfds.features.Scalar(dtype=np.object_),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for clip in clips:
                content = (
                    clip.path.read_bytes() if isinstance(clip.path, Place) else clip.path.read()
                )
                yield (
                    clip.name,
                    {
                        "name": clip.name,
                        "kind": clip.kind,
                        "captions": list(clip.captions),
                        "file": content,
                    },
                )

    CaptionedClips.name = name
    builder = CaptionedClips(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@functools.cache
def _examples(folder: Path):
    return _open(folder)[0]


def _open(folder: Path) -> tuple:
    """Return the examples, their features, the split's name, and the file and caption features."""
    import tensorflow_datasets as tfds  # the import takes seconds, and only this layout needs it

    try:
        builder = tfds.builder_from_directory(folder)
        features, splits = builder.info.features, list(builder.info.splits)
        split = "train" if "train" in splits else splits[0]
        file = next((name for name in FILES if name in features), None)
        text = next((name for name in TEXTS if name in features), None)
        if file is None or text is None:
            raise ValueError(
                f"its features {list(features)} must hold one of {FILES} and one of {TEXTS}"
            )
        decode = {file: tfds.decode.SkipDecoding()}
        examples = builder.as_data_source(split, decoders=decode)
        len(examples)  # opens the files
    except (ValueError, OSError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is no readable TFDS data set in ArrayRecord: {error}"
        ) from error
    return examples, features, split, file, text


def _captions(feature, value) -> list:
    if hasattr(feature, "int2str"):
        return [feature.int2str(int(value))]
    if isinstance(value, bytes | str):
        return [_text(value)]
    return [_text(v) for v in value] or [None]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
