"""gemwright: the Gemma 2 recipe as software.

>>> import gemwright
>>> model = gemwright.load("runs/laptop/distilled")
>>> model.generate("def __init__(self")
>>> gemwright.Chat(gemwright.load("google/gemma-2-2b-it")).ask("Why is the sky blue?")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemwright.generate.language_model import Chat, load

__all__ = ["Chat", "load"]


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when asked for: torch takes seconds; `gemwright --help` should not."""
    if name in __all__:
        from gemwright.generate import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module 'gemwright' has no attribute {name!r}")
