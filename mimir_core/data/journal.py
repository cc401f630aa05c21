"""What is finished, in one file that only grows while a run works: a killed run loses no finished piece.

One line per piece: key, a mark ("d" done, "r" may be tried again), JSON. The index in memory is small (a key
and a place in the file), so that millions of clips fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

COMPACT = 0.5  # rewritten at the end of a run when less than this share of the lines is still used


class Journal:
    """`key in journal`, `journal[key]`, `put`. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, int] = {}
        self.lines = 0

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")  # noqa: SIM115  closed by __exit__
        self._index()
        return self

    def __exit__(self, *failure: object) -> None:
        self.file.close()

    def _index(self) -> None:
        self.file.seek(0)
        place = 0
        for line in self.file:
            if not line.endswith(b"\n"):  # the run was killed while it wrote this
                self.file.truncate(place)
                break
            key, mark, _ = line.split(b" ", 2)
            self.lines += 1
            if mark == b"d":
                self.places[key.decode()] = place
            place += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __getitem__(self, key: str) -> dict[str, Any]:
        self.file.seek(self.places[key])
        return json.loads(self.file.readline().split(b" ", 2)[2])

    def forget(self, key: str) -> None:
        del self.places[key]

    @staticmethod
    def keys(path: Path) -> set[str]:
        """What is finished, by only reading; empty where there is no journal."""
        if not path.is_file():
            return set()
        with open(path, "rb") as file:
            lines = (line.split(b" ", 2) for line in file if line.endswith(b"\n"))
            return {line[0].decode() for line in lines if line[1] == b"d"}

    def put(self, key: str, result: dict[str, Any], retry: bool = False) -> None:
        """`retry`: known for the rest of this run, forgotten by the next."""
        line = f"{key} {'r' if retry else 'd'} {json.dumps(result)}\n".encode()
        self.places[key] = self.file.seek(0, os.SEEK_END)
        self.file.write(line)
        self.file.flush()
        self.lines += 1

    def compact(self, used: Collection[str]) -> None:
        """Drop what no longer belongs to anything, if that is most of the file."""
        if len(used) >= COMPACT * self.lines:
            return
        fresh = self.path.with_suffix(".tmp")
        with open(fresh, "wb") as file:
            for key in used:
                self.file.seek(self.places[key])
                file.write(self.file.readline())
        self.file.close()
        os.replace(fresh, self.path)
        self.places, self.lines = {}, 0
        self.__enter__()
