"""Names that people give to what is written, and the folders below output/mimir where it goes.

A name may have sub-folders with forward slashes. It never leads out of its folder, and it is one that every
system can store, since people move their files.
"""

import os
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath

import folder_paths

FOLDER = "mimir"  # below the output folder, where everything of ours goes
DATASETS, FEATURES, RUNS = "datasets", "features", "training"  # below it
FORBIDDEN = '<>:"|?*\\'  # on Windows
RESERVED = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{digit}" for port in ("COM", "LPT") for digit in range(1, 10)),
}
LONGEST = 200  # bytes of a name; file systems take 255, with a number and an ending
_made: dict[str, Path] = {}
_lost: Counter[str] = Counter()


def place(kind: str, name: str, what: str = "name") -> Path:
    """The folder output/mimir/<kind>/<name>, which need not be there. ValueError for a name that is none.

    what: how the node calls this input.
    """
    return Path(folder_paths.get_output_directory(), FOLDER, kind, checked(name, what))


def checked(name: str, what: str = "name") -> PurePosixPath:
    """A name below some folder. ValueError for an empty one, one that leads elsewhere or is not portable."""
    below = PurePosixPath(name.strip().replace("\\", "/"))  # Windows takes both
    if not below.parts or below.is_absolute() or ".." in below.parts:
        raise ValueError(f"{what} is {_shown(name)}: expected a plain name like 'my_videos', without '..'.")
    require_portable(what, str(below))
    return below


def require_name(name: str | None) -> bool:
    """True, or the ValueError of `checked`, for a node's validation. None: linked, and not known yet."""
    return name is None or bool(checked(name).parts)


def remember(key: str, file: Path) -> None:
    """`file` is what has just been made under the name `key`."""
    _made[key] = file


def times_lost(key: str) -> int:
    """How often what was made under `key` is gone again: part of a fingerprint, so that its node makes it
    anew instead of handing on what the host remembers."""
    if key in _made and not _made[key].exists():
        del _made[key]
        _lost[key] += 1
    return _lost[key]


def shown_place(path: Path) -> str:
    """How a path below the output folder is named to people: output/mimir/..."""
    return f"output/{Path(path).relative_to(folder_paths.get_output_directory()).as_posix()}"


def require_portable(what: str, name: str) -> None:
    """ValueError for a name, with forward slashes between its folders, that some system cannot store."""
    parts = name.replace(os.sep, "/").split("/")
    wrong = sorted({char for part in parts for char in part if not _storable(char)})
    length = len(name.encode(errors="replace"))
    reserved = [part for part in parts if part.partition(".")[0].strip().upper() in RESERVED]
    ends = [part for part in parts if part not in (".", "..") and part != part.strip(" .")]
    if wrong:
        problem = f"has {', '.join(map(ascii, wrong))}, which not every system can store in a name"
    elif length > LONGEST:
        problem = f"is {length} bytes long, expected at most {LONGEST}"
    elif reserved or ends:
        problem = f"has the part '{(reserved or ends)[0]}', which Windows cannot store"
    else:
        return
    raise ValueError(f"{what} {_shown(name)} {problem}: choose another name.")


def _storable(char: str) -> bool:
    return char not in FORBIDDEN and unicodedata.category(char) not in ("Cc", "Cs")


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "...")
