"""What was left out of rows and clips, with the reasons, and how many clips may be unreadable."""

import json
from collections.abc import Callable, Collection, Sequence

from easyanimate_jax.storage.stores import Place, Remote, replace_text

MAX_BAD = 0.05  # share of a set's clips that may be unreadable


class TooManyUnreadable(ValueError):
    """So many clips of a set cannot be read that something else may be wrong."""

    lines: Sequence[str] = ()  # of those that are not in the quarantine yet


class Quarantine:
    """A JSON-lines file of what was left out of rows and clips; no line stands in it twice.

    A store cannot append: there the file is written at the end.
    """

    def __init__(self, path: Place):
        self.path = path
        text = path.read_text("utf-8") if path.is_file() else ""
        self.lines = dict.fromkeys(filter(None, text.split("\n")))

    def add(self, line: str) -> None:
        """Append a line, unless the file already has it. On a full disk append nothing."""
        if line in self.lines:
            return
        self.lines[line] = None
        if isinstance(self.path, Remote):
            return
        content = (line + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError as error:
                file.truncate(size)
                error.filename = str(self.path)
                raise

    def files(self) -> set[str | None]:
        """Return the files that have a line."""
        return set(map(file_of, self.lines))

    def forget(self, files: Collection[str], *, but: Sequence[str]) -> None:
        """Remove the lines of these files, except the lines `but`, which the file then has.

        A file without a line is removed.
        """
        old = [line for line in self.lines if file_of(line) not in files]
        lines = dict.fromkeys([*but, *old])
        if lines and (set(lines) != set(self.lines) or isinstance(self.path, Remote)):
            replace_text(self.path, "".join(f"{line}\n" for line in lines))
        elif not lines:
            self.path.unlink(missing_ok=True)
        self.lines = lines


class LeftOut:
    """Takes the line of each unreadable clip of a set of `jobs` clips, and passes it to `note`.

    Raises TooManyUnreadable, naming `path`, which holds the lines, after too many of them.
    """

    def __init__(self, name: str, jobs: int, path: Place, note: Callable[[str], object]):
        self.name, self.jobs, self.path, self.note, self.bad = name, jobs, path, note, 0

    def __call__(self, line: str) -> None:
        self.bad += 1
        self.note(line)
        if self.bad > max(1, MAX_BAD * self.jobs):
            raise TooManyUnreadable(
                f"set {self.name!r}: {self.bad} of {self.jobs} clips cannot be read; "
                f"repair or remove them. The reasons are in {self.path}"
            )


def line_of(entry: dict) -> str:
    """Return the line of an entry."""
    return json.dumps(entry, ensure_ascii=False)


def file_of(line: str) -> str | None:
    """Return the file that a line names; None if the line was cut short by a kill."""
    try:
        return json.loads(line)["file"]
    except (ValueError, KeyError, TypeError):
        return None
