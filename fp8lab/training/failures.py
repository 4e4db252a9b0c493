"""Which rank's error ended a run of several, and what it was.

Where one rank fails, the others fail of its absence in whatever they do together next: an error that says
nothing. So the first to fail says why in the run's folder before it leaves, and the others find it there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from fp8lab.errors import UserError
from fp8lab.training.distributed import World

FILE_NAME = ".failure.json"


class PeerFailed(Exception):
    """Another rank failed before this one; the message is that rank's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def shared_with_peers(folder: Path, world: World, agreed: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Around what the ranks do together: an error of one of them becomes the reason of all.

    Args:
        folder: the run's, on a file system that all ranks see.
        world: the ranks.
        agreed: errors that all ranks raise alike, each by itself.

    Raises:
        PeerFailed: in place of an error that came after another rank's.
    """
    try:
        yield
    except BaseException as error:
        if world.size == 1 or isinstance(error, agreed):
            raise
        first = _first_failure(folder, world.rank, error)
        if first["rank"] == world.rank:
            raise
        raise PeerFailed(f"rank {first['rank']}: {first['message']}", first["exit_code"]) from error


def forget(folder: Path) -> None:
    """Remove what an earlier attempt has left."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """An error as a record gives it: with its type, unless the message is written for the user."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError | PeerFailed) else f"{type(error).__name__}: {text}"


def _first_failure(folder: Path, rank: int, error: BaseException) -> dict[str, Any]:
    """Put `error` into the file unless another is there, and return the one that is."""
    failure = {"rank": rank, "message": one_line(error), "exit_code": 2 if isinstance(error, UserError) else 1}
    path, own = folder / FILE_NAME, folder / f"{FILE_NAME}.{rank}"
    try:
        own.write_text(json.dumps(failure))
        # A hard link is there at once and whole, and fails where there is one already.
        os.link(own, path)
    except FileExistsError:
        return cast(dict[str, Any], json.loads(path.read_text()))
    except OSError:
        # The disk may be what failed.
        return failure
    finally:
        with contextlib.suppress(OSError):
            own.unlink()
    return failure
