"""Models of ours in lm-evaluation-harness: its tasks, its metrics, our forward passes.

The harness puts a task's questions and computes its scores. What it asks a model goes through the house's own
roads: continuations through `likelihood`, where choices share their context, and what is written through the
scheduler. Tokens are those of the harness's own model of transformers' (`hf`), and so are the scores:

* A context and its continuation are encoded as one text, and what goes beyond the context's own ids is the
  continuation; spaces at the context's end count as the continuation's. An empty context is `<bos>`.
* What does not fit into `max_seq_len` loses its beginning, and with it `<bos>`.

In three things `hf` does worse. Of a text's perplexity it reads `<bos>` twice, unless it is made with
`add_bos_token=False`; here it stands once. A control token that a question spells, it takes for the token;
here it stays text. And it drops a system message, which here begins the user's first turn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemwright.device import available_memory
from gemwright.evaluate.likelihood import Request, log_likelihoods
from gemwright.generate.language_model import LanguageModel
from gemwright.generate.sampling import Sampling
from gemwright.generate.scheduler import Scheduler
from gemwright.run import progress
from gemwright.tokenizer.chat import encode_prompt, fold_system
from gemwright.tokenizer.stream import TextStream
from gemwright.tokenizer.template import TEMPLATE
from gemwright.tokenizer.tokenizer import CONTROL

_MAX_TOKENS = 256  # where a task does not say, as in the harness
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    include: Path,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    max_batch: int = 32,
) -> dict[str, dict[str, Any]]:
    """Scores of a model on tasks that a folder describes, offline: by task, then by metric and filter.

    Args:
        include: a folder with the tasks' YAML files. Those that the harness brings are left out: most want
            data from the network.
        shots: examples before a question; the task's own number if None.
        limit: only so many questions a task.
        chat: put questions as turns of a conversation, for a chat model.
        max_batch: texts written at a time.
    Raises:
        ImportError: the harness is not installed.
        ValueError: a task that the folder does not describe, or that asks for what cannot be.
    """
    one = as_lm(model, max_batch=max_batch)
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=str(include), include_defaults=False)
    if missing := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"{include} describes no task {missing[0]!r}. It has {', '.join(manager.all_tasks) or 'none'}: "
            "correct the name, or put the task's YAML file there."
        )
    evaluate: Any = lm_eval.simple_evaluate
    found = evaluate(
        model=one, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit,
        apply_chat_template=chat, fewshot_as_multiturn=chat, log_samples=False,
    )  # fmt: skip
    return found["results"]


def as_lm(model: LanguageModel, *, max_batch: int = 32) -> Any:
    """A model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`.

    Raises:
        ImportError: the harness is not installed.
        ValueError: the model has no tokenizer.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            "tasks are put by lm-evaluation-harness, which is not installed. "
            "Use `pip install 'gemwright[eval]'`."
        ) from None
    return type("Harness", (Harness, LM), {})(model, max_batch)


class Harness:
    """What the harness asks of a model, without its base class: see `as_lm`.

    Requests are its `Instance`s, of which only `args` counts.
    """

    def __init__(self, model: LanguageModel, max_batch: int) -> None:
        super().__init__()
        self.model = model
        self.max_batch = max_batch
        self.tokenizer = model.require_tokenizer()
        self._chats: dict[str, tuple[list[int], str]] = {}
        """By a conversation's text: its ids up to the last `<start_of_turn>`, and the text after that."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-likelihood, and whether it is what the model would say."""
        begun = [self._begun(request.args[0]) for request in requests]
        wholes = [
            text + request.args[1] if text else request.args[1].removeprefix("<bos>")
            for (_, text), request in zip(begun, requests, strict=True)
        ]
        kept = {text: text.rstrip() for _, text in begun}
        contexts = dict(zip(kept, self.tokenizer.encode_batch([*kept.values()]), strict=True))
        found: list[Request] = []
        for (head, text), ids in zip(begun, self.tokenizer.encode_batch(wholes), strict=True):
            before, after = contexts[text], ids[len(contexts[text]) :]
            if not after:  # both together are fewer pieces than the context alone
                before, after = ids[:-1], ids[-1:]
            found.append(self._shortened([*head, *before], after))
        return self._scores("scoring", found)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihoods of whole texts, in windows of `max_seq_len`: each token is scored once."""
        from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
            get_rolling_token_windows,
            make_disjoint_window,
        )

        windows: list[Request] = []
        owners: list[int] = []
        texts = [request.args[0].removeprefix("<bos>") for request in requests]
        for number, ids in enumerate(self.tokenizer.encode_batch(texts)):
            parts = get_rolling_token_windows(ids, self.tokenizer.bos_id, self._longest, context_len=1)
            windows += map(make_disjoint_window, parts)
            owners += [number] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._scores("reading", windows), strict=True):
            sums[owner] += log_p
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations up to a task's `until` strings, `<eos>` or `<end_of_turn>`.

        Request number i draws with seed i, where a task draws at all.

        Raises:
            ValueError: a setting that is not known, or one that leaves no room for a context.
        """
        gemma = self.model.model
        scheduler = Scheduler(gemma, max_batch=self.max_batch, max_kv_bytes=available_memory(gemma.device))
        running = {}
        for number, request in enumerate(requests):
            context, settings = request.args[:2]
            sampling = self._sampling(settings).but(seed=number)
            ids = self._context(context)[-(self._longest - sampling.max_tokens) :]
            stream = TextStream(self.tokenizer, sampling.stop)
            running[scheduler.submit(ids, sampling)] = number, stream
        texts = [""] * len(requests)
        with progress("writing", len(requests), unit="texts") as advance:
            while running:
                for request, token in scheduler.step():
                    number, stream = running[request]
                    if token is not None:
                        stream.push(token.id)
                    if stream.stopped or request.finish:
                        scheduler.cancel(request)
                        stream.finish()
                        del running[request]
                        texts[number] = stream.text
                        advance(1)
        return texts

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a text, up to where the model's answer begins, or goes on.

        Whoever gives this text back as a context is given the ids of `tokenizer.chat`, in which no content
        forges a turn.
        """
        messages, begun = fold_system(chat_history), ""
        if not add_generation_prompt:
            begun = messages.pop()["content"]
        ids = encode_prompt(self.tokenizer, messages)
        last = len(ids) - ids[::-1].index(CONTROL["<start_of_turn>"])
        text = self.tokenizer.decode(ids, control=True) + begun
        self._chats[text] = ids[:last], self.tokenizer.decode(ids[last:]) + begun
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The house's template, for the harness's records."""
        return TEMPLATE if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Which tokenizer a request was made with, for the harness's own cache of requests."""
        return f"gemwright-{self.tokenizer.sha256[:16]}"

    @property
    def _longest(self) -> int:
        return self.model.config.max_seq_len

    def _begun(self, context: str) -> tuple[list[int], str]:
        """A context: ids, and text to encode after them."""
        if context in self._chats:
            return self._chats[context]
        return [self.tokenizer.bos_id], context.removeprefix("<bos>")

    def _context(self, context: str) -> list[int]:
        head, text = self._begun(context)
        return head + self.tokenizer.encode(text)

    def _shortened(self, context: list[int], continuation: list[int]) -> Request:
        """As much of it as can be read; the last id of a continuation never is."""
        return context[-max(1, self._longest + 1 - len(continuation)) :], continuation

    def _scores(self, what: str, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        with progress(what, len(requests), unit="requests") as advance:
            found = log_likelihoods(self.model.model, requests, advance=advance)
        return [(log_p, greedy) for log_p, greedy in found]

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        """A task's `generation_kwargs`, in the words of the harness or of transformers."""
        left = dict(settings)
        until = left.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        lengths = [left.pop(name) for name in _LENGTHS if name in left]
        most = int(next((length for length in lengths if length is not None), _MAX_TOKENS))
        if most >= self._longest:
            raise ValueError(
                f"a task asks for {most} new tokens (max_gen_toks), and the model's max_seq_len of "
                f"{self._longest} leaves no room for a context. Lower it in the task's generation_kwargs."
            )
        temperature, sample = left.pop("temperature", None), left.pop("do_sample", None)
        if sample is False or (sample is None and temperature is None):
            temperature = 0.0
        asked = {
            "max_tokens": most, "temperature": 1.0 if temperature is None else temperature,
            "stop": [stop for stop in stops if stop],
        }  # fmt: skip
        return Sampling.parse(asked | left)
