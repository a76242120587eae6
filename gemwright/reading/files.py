"""Which files there are: below a folder, and of the running Python's standard library."""

import os
import re
import sysconfig
from pathlib import Path

_LIBRARY_SUFFIXES = {".py", ".rst", ".txt"}

# Test suites are 17 MB beside 11 MB of library: tables, files broken on purpose, and some systems ship only a
# part. encodings/ is tables of code points. The rest belongs to the machine or to installed packages.
_LIBRARY_LEFT_OUT = (
    r"test|tests|idle_test|encodings|__pycache__|site-packages|dist-packages|config-.*|_sysconfigdata.*"
    r"|(site|user)customize\.py"
)


def library_files() -> tuple[Path, list[Path]]:
    """The folder of this Python's standard library, and the files of it that are read.

    Raises:
        FileNotFoundError: this Python keeps no standard library in plain files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    kept = [path for path in files(root, _LIBRARY_LEFT_OUT) if path.suffix in _LIBRARY_SUFFIXES]
    if not kept:
        raise FileNotFoundError(
            f"{root} holds no standard library in plain files. Give a folder of text of your own."
        )
    return root, kept


def files(root: Path, left_out: str = "") -> list[Path]:
    """Every file below a folder, in an order that no locale or file system changes.

    Hidden names, and those that the pattern `left_out` matches, are passed over, folders with all below them.
    """
    names = re.compile(rf"\..*|{left_out}")
    found: list[Path] = []
    for folder, below, names_of_files in os.walk(root, onerror=_refuse):
        below[:] = [name for name in below if not names.fullmatch(name)]
        found += [Path(folder, name) for name in names_of_files if not names.fullmatch(name)]
    return sorted(
        (path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix()
    )


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed stops the walk: passed over, its files would be missing unseen."""
    raise error
