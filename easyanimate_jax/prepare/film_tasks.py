"""Cut and score films on a Ray cluster: `curate --engine ray`.

A task is a few films, on one CPU anywhere. It writes their records, as the threads of one process
do, so a driver that was killed is started again by the same command.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from easyanimate_jax.data.decode import decoders
from easyanimate_jax.prepare.cluster import Failure, Unusable, check_seen, connected, on_all_cpus
from easyanimate_jax.prepare.films import Films
from easyanimate_jax.storage.stores import Place, make_folder

logger = logging.getLogger(__name__)

FILMS = 8  # of a task


def on_cluster(films: Films, names: Sequence[str], _workers: int) -> None:
    """Make the rows of films on the cluster, with all its CPUs; log those that cannot be made.

    Raises ValueError if a host does not see the films, and ConnectionError if a model does not
    serve.
    """
    places = films.folder.root, films.out / "films"
    make_folder(films.out / "films")
    seen = tuple(path for path in places if isinstance(path, Path))
    some = (names[first : first + FILMS] for first in range(0, len(names), FILMS))
    calls = ((films.only(part), seen) for part in some)
    with connected(), tqdm(total=len(names), desc="films", unit="film") as progress:
        for (part, _), result in on_all_cpus(finish_films, calls, (Unusable,)):
            if isinstance(result, Failure):
                told = ", ".join(part.folder.films)
                logger.error(f"these films are not finished: {told}: {result.reason}")
            elif result is not None:
                raise result
            progress.update(len(part.folder.films))


def finish_films(films: Films, seen: tuple[Place, ...]) -> ConnectionError | None:
    """Make the rows of films; return an error if a model does not serve.

    Raises `Unusable` as `check_seen` does.
    """
    check_seen(seen)
    try:
        for name in films.folder.films:
            films.finish(name, decoders())
    except ConnectionError as error:
        return error
    finally:
        films.store.flush()
