"""What a process with the models makes of manifests: prompts, shards of texts, shards of sets.

It knows no engine. `prepare` has one `Device` in its own process, and a cluster one on each host.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence

import jax

from easyanimate_jax.data.records import write_texts
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.prepare.encode import Encoder
from easyanimate_jax.prepare.manifest import Manifest
from easyanimate_jax.prepare.quarantine import LeftOut
from easyanimate_jax.prepare.reader import Decode, Reader
from easyanimate_jax.prepare.sets import SetMaker
from easyanimate_jax.prepare.texts import TextMaker
from easyanimate_jax.storage.stores import Place

logger = logging.getLogger(__name__)

ROWS = 16  # clips encoded at once, at most


class Device:
    """The models on the devices of this process; several threads may use it.

    `texts` holds the text encoder. `workers` clips can be decoded at the same time by `decode`.
    """

    def __init__(
        self,
        vae: CausalVAE | None,
        texts: TextMaker,
        seed: int,
        decode: Decode,
        workers: int | None = None,
    ):
        self.vae, self.maker_of_texts, self.seed = vae, texts, seed
        self.decode, self.workers = decode, workers or os.cpu_count()
        self.encoder, self.lock = None, threading.Lock()

    def prompts(self, output: Place, prompts: Sequence[str], about: str) -> list[str]:
        """Write the states of the empty prompt and of `prompts`; return those that are cut.

        `about` is the key of the states of the sample prompts.
        """
        maker = self.maker_of_texts
        write_texts(output / "empty.safetensors", maker.batch([""]))
        if prompts:
            write_texts(output / "prompts.safetensors", maker.batch(prompts), about)
        return [prompt for prompt in prompts if maker.text_encoder.is_cut(prompt)]

    def texts(self, manifest: Manifest, shard: int) -> None:
        """Make one shard of the text states."""
        self.maker_of_texts.make(manifest, shard)

    def pixels(
        self,
        maker: SetMaker,
        manifest: Manifest,
        shards: Iterable[int],
        left_out: LeftOut,
        progress: Callable[[int], object],
    ) -> None:
        """Make shards of a set; the arguments are those of `Reader`. Raises as `Reader` does."""
        todos = (maker.todo(manifest, shard) for shard in shards)
        if maker.latent_set.pixels:
            for todo in todos:
                maker.write_places(manifest, todo)
                progress(len(todo.jobs))
            return
        with self.lock:
            if self.encoder is None:
                devices = jax.local_devices()
                self.encoder = Encoder(self.vae, devices, most=ROWS, announce=logger.info)
        how = self.encoder, self.decode, self.workers, left_out, progress
        for todo, found in Reader(maker.latent_set, self.seed, *how)(todos):
            maker.write(manifest, todo, found)
