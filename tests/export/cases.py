"""llama.cpp, to read what we write; and our own side of what it is compared with."""

import json
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemwright.model.gemma import Gemma


class Step(NamedTuple):
    """One new token of llama.cpp, and its log-probabilities of the likeliest ids there."""

    id: int
    logprobs: dict[int, float]


# It does not report a step that gives part of a character, and an end would be one: neither is to be drawn.
# The log-probabilities that it tells are those before that.
BANNED = (1, 107, *range(217, 473))


class LlamaCpp:
    """llama.cpp with one file: everything in fp32 that it lets one choose, and one thread."""

    def __init__(self, file: Path) -> None:
        import xllamacpp  # pyright: ignore[reportMissingImports]

        asked = xllamacpp.CommonParams()
        asked.model.path = str(file)
        asked.n_ctx = 256
        asked.cpuparams.n_threads = 1
        asked.warmup = False
        asked.verbosity = 0
        asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(asked)

    def complete(self, prompt: list[int] | str, **options: Any) -> dict[str, Any]:
        """Its answer to a completion of likeliest tokens."""
        return self._server.handle_completions({"prompt": prompt, "temperature": 0, "top_k": 1, **options})

    def steps(self, prompt: list[int], number: int = 20) -> list[Step]:
        """The likeliest `number` tokens after a prompt, one by one."""
        banned = [[id, False] for id in BANNED]
        told = self.complete(prompt, max_tokens=number, logprobs=5, logit_bias=banned)["choices"][0]
        assert len(told["logprobs"]["content"]) == number
        return [
            Step(step["id"], {top["id"]: top["logprob"] for top in step["top_logprobs"]})
            for step in told["logprobs"]["content"]
        ]

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text, <bos> first; `special` lets spelled control tokens become theirs."""
        asked = {"content": text, "add_special": True, "parse_special": special}
        return self.ask("/tokenize", asked)["tokens"]

    def ask(self, path: str, data: dict[str, Any]) -> dict[str, Any]:
        """What its server at home answers."""
        url = self._server.listening_address + path
        request = urllib.request.Request(url, json.dumps(data).encode(), {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as answer:
            return json.load(answer)


@torch.no_grad()
def greedy(model: Gemma, prompt: list[int], number: int = 20) -> list[int]:
    """Our own likeliest tokens, as `LlamaCpp.steps` draws them, each read anew with all before it."""
    ids = list(prompt)
    for _ in range(number):
        logits = model(torch.tensor([ids]))[0, -1]
        logits[list(BANNED)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]
