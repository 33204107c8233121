"""Make the rows of films, keep them, and find out which are made."""

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from easyanimate_jax.data.contents import kept_contents, key
from easyanimate_jax.data.decode import Decoders
from easyanimate_jax.facts import check_fields
from easyanimate_jax.prepare.clip_rows import film_rows, told_again
from easyanimate_jax.prepare.film_folder import FilmFolder
from easyanimate_jax.prepare.film_store import FilmStore, slot_of
from easyanimate_jax.prepare.model_steps import ModelSteps
from easyanimate_jax.prepare.scores import Score
from easyanimate_jax.prepare.settings import told
from easyanimate_jax.prepare.shots import Splitting
from easyanimate_jax.storage.stores import Place

READERS = 64  # films that are looked up at once
AHEAD = 1024  # films that may be finished before an earlier one is


@dataclass(frozen=True)
class Rules:
    """Rules for cutting films and for the least size; the scores have their own thresholds."""

    splitting: Splitting = Splitting()
    """Rules for the length of clips."""

    min_pixels: int = 512 * 512
    """Least pixels of a frame; 0 accepts all sizes. The default is the reference's (spec 13)."""

    def __post_init__(self):
        check_fields(self, min_pixels="[0, inf)")


class Films:
    """The films of a source, and the records of those that are finished.

    A record holds the key of the film's content and settings, and its rows. `known` are records
    that another process has read.
    """

    def __init__(
        self,
        out: Place,
        folder: FilmFolder,
        rules: Rules,
        scores: Sequence[Score],
        steps: ModelSteps,
        known: dict[str, dict] | None = None,
    ):
        self.out, self.folder = out, folder
        self.rules, self.scores, self.steps = rules, scores, steps
        self.store, self.contents = FilmStore(out / "films", known), kept_contents(out)
        measures = [(s.name, s.frames, told(s.measure)) for s in scores if not s.of_captions]
        self.settings = key(dataclasses.asdict(rules), measures)

    def __reduce__(self):
        """Make it anew in another process, which keeps its own hashes of files."""
        made_of = self.out, self.folder, self.rules, self.scores, self.steps, self.store.known
        return Films, made_of, {"settings": self.settings}

    def names(self, part: tuple[int, int] = (0, 1)) -> list[str]:
        """Return the names of the films of a part, in the order of their places in the store."""
        number, parts = part
        placed = sorted((slot_of(name), name) for name in self.folder.films)
        return [n for slot, n in placed if int(slot.replace("/", ""), 16) % parts == number]

    def finish(self, name: str, decoders: Decoders) -> None:
        """Make the rows of a film and keep them, unless they are kept.

        Raises ConnectionError if a model does not serve; what was made before that is kept.
        """
        made_of = self._key(name)  # before it is read: it may change meanwhile
        rows = self._kept(name, made_of)
        if rows is None:
            how = self.rules.splitting, self.scores, self.steps
            rows, away = film_rows(decoders, self.folder, name, *how)
        elif self._lacks(name, rows):
            rows, away = told_again(decoders, self.folder, name, rows, self.steps)
        else:
            return
        self.store.write(*self._at(name), {"key": made_of, "rows": rows})
        if away is not None:
            raise away

    def rows(self, name: str) -> list[dict] | None:
        """Return the rows of a film for the table; None if it is not finished."""
        rows = self._kept(name, self._key(name))
        if rows is None or self._lacks(name, rows):
            return None
        return [self.steps.shown(row, self.folder.films[name]) for row in rows]

    def all_rows(self) -> Iterator[list[dict] | None]:
        """Yield what `rows` returns for each film, in the order of `names`."""
        with ThreadPoolExecutor(READERS) as pool:
            yield from _mapped(pool, self.rows, self.names(), AHEAD)

    def have_all(self) -> bool:
        """Return whether each film has a record; it may be of another content."""
        return all(self.record(name) for name in self.names())

    def record(self, name: str) -> dict | None:
        """Return the record of a film, whatever its content is now."""
        return self.store.read(*self._at(name))

    def only(self, names: Sequence[str]) -> "Films":
        """Return these films with their records, to send to another process."""
        folder = copy.copy(self.folder)
        folder.films = {name: self.folder.films[name] for name in names}
        folder.unusable = []
        found = {self._at(name)[1]: self.record(name) for name in names}
        known = {film: record for film, record in found.items() if record}
        return Films(self.out, folder, self.rules, self.scores, self.steps, known)

    def _at(self, name: str) -> tuple[str, str]:
        """Return slot and key of a film in the store."""
        return slot_of(name), key(self.settings, name)

    def _kept(self, name: str, made_of: str) -> list[dict] | None:
        """Return the rows of a film that are kept; None if they are of another content."""
        record = self.record(name)
        return record["rows"] if record and record["key"] == made_of else None

    def _lacks(self, name: str, rows: list[dict]) -> bool:
        """Return whether a clip of a film wants what models have not made yet."""
        return any(self.steps.lacks(row, self.folder.films[name]) for row in rows)

    def _key(self, name: str) -> str:
        """Return the key of a film's content and types."""
        try:
            content = self.contents(self.folder.path(name))
        except ValueError as error:  # the name is refused
            content = str(error)
        return key(content, sorted(self.folder.films[name].kinds))


def in_threads(films: Films, names: Sequence[str], workers: int) -> None:
    """Make the rows of films in threads. Raises ConnectionError if a model does not serve."""
    decoders, served = Decoders(workers), True

    def work(name: str) -> None:
        nonlocal served
        try:
            if served:
                films.finish(name, decoders)
        except ConnectionError:
            served = False
            raise

    try:
        with ThreadPoolExecutor(workers) as pool:
            made = _mapped(pool, work, names, AHEAD)
            for _ in tqdm(made, total=len(names), desc="films", unit="film"):
                pass
    finally:
        films.store.flush()
        decoders.close()


def _mapped(
    pool: ThreadPoolExecutor, work: Callable[[str], Any], names: Iterable[str], ahead: int
) -> Iterator[Any]:
    """Yield the results of work on names in order; at most `ahead` are made before one is taken."""
    waiting = deque()
    for name in names:
        waiting.append(pool.submit(work, name))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
