"""`gemwright.load(folder)`: a model and its tokenizer as one object, for one's own code."""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemwright.device import pick_device
from gemwright.generate.engine import decode
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import CONTROL, MODEL_FILE, Tokenizer


class LanguageModel:
    """A loaded checkpoint: called on ids (B, T) it gives the capped fp32 logits (B, T, V)."""

    def __init__(self, model: Gemma, tokenizer: Tokenizer | None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        """None where the folder has no `tokenizer.model`."""

    @property
    def config(self) -> GemmaConfig:
        """The model's config."""
        return self.model.config

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of every position, final soft-cap applied, without gradients (train through `.model`)."""
        return self.model(ids.to(self.model.unembedding.device))

    def stream(
        self, prompt: str, *, max_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Yield the continuation of `prompt` piece by piece, until <eos>, <end_of_turn> or `max_tokens`.

        Raises:
            ValueError: the folder has no tokenizer, or prompt and `max_tokens` do not fit; at once.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint has no tokenizer.model: generate from ids with gemwright.generate.engine."
            )
        tokenizer = self.tokenizer
        ids = decode(
            self.model,
            tokenizer.encode(prompt, bos=True),
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop_ids=(CONTROL["<eos>"], CONTROL["<end_of_turn>"]),
        )

        def texts() -> Iterator[str]:
            done: list[int] = []
            told = 0
            for token in ids:
                done.append(token)
                text = tokenizer.decode(done)
                if not text.endswith("�"):  # else the bytes of a character are not all there yet
                    yield text[told:]
                    told = len(text)
            yield tokenizer.decode(done)[told:]

        return texts()

    def generate(self, prompt: str, *, max_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> str:
        """The continuation of `prompt` as one string; arguments and errors as `stream`."""
        return "".join(self.stream(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed))


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LanguageModel:
    """Load a Hugging Face directory of a Gemma 2 model, in its own number format unless `dtype` is given.

    Raises:
        FileNotFoundError: there is no such folder, or a file of the checkpoint is missing.
        ValueError: it is not a Gemma 2, or it is damaged; the message says where.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. Give one that holds a Gemma 2 checkpoint (config.json, ...)."
        )
    model = checkpoint.load(folder, dtype=dtype, device=device or pick_device())
    return LanguageModel(model, Tokenizer.load(folder) if (folder / MODEL_FILE).exists() else None)
