"""gemwright: the Gemma 2 recipe as software.

>>> import gemwright
>>> model = gemwright.load("runs/laptop/distilled")
>>> model.generate("def __init__(self")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemwright.generate.language_model import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`gemwright.load`, imported when asked for: torch takes seconds, and `gemwright --help` should not."""
    if name == "load":
        from gemwright.generate.language_model import load

        return load
    raise AttributeError(f"module 'gemwright' has no attribute {name!r}")
