"""Decoding with a cache against transformers: logits at every step, and the ids of its `generate`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.generate import engine, scheduler
from gemwright.generate.engine import Session
from gemwright.generate.sampling import Sampling
from gemwright.generate.scheduler import Scheduler
from gemwright.generate.speculative import SpeculativeSession
from gemwright.model import checkpoint, gemma
from gemwright.model.attention import remembered
from gemwright.model.gemma import Gemma

pytestmark = pytest.mark.parity
Pair = Callable[..., tuple[Any, Any]]
Both = Callable[..., tuple[Gemma, Any]]

CHUNKS: dict[str, list[int]] = {
    "token by token": [1] * 24,
    "a prompt, then token by token": [5] + [1] * 19,
    "a prompt beyond two windows": [17] + [1] * 7,
    "turns": [3, 6, 1, 9, 5],
    "all at once": [24],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "like 2B and 9B: the scale is that of the head": {},
    "like 27B: the scale is that of the width": {"head_dim": 4, "query_pre_attn_scalar": 8},
    "one key head": {"num_kv_heads": 1},
    "tight caps": {"attn_softcap": 5.0, "final_softcap": 3.0},
    "a window of one": {"window": 1},
}


@pytest.fixture
def both(pair: Pair, tmp_path: Path) -> Both:
    """`both(**changes) -> (ours, theirs)`: transformers saves a folder, and both are loaded from it.

    A model that `speaks` has small embeddings: else each token would be its own likeliest successor.
    """

    def build(speaks: bool = False, **changes: Any) -> tuple[Gemma, Any]:
        from transformers import AutoModelForCausalLM

        _, model = pair(**changes)
        if speaks:
            model.get_input_embeddings().weight.data *= 0.02
        model.save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        return checkpoint.load(tmp_path, device="cpu").eval(), theirs

    return build


@torch.no_grad()
def difference(ours: Gemma, theirs: Any, ids: Sequence[int], chunks: list[int], rewind: int = 0) -> float:
    """The largest difference of a logit, ours read chunk by chunk, theirs without a cache."""
    session, logits = Session(ours, rewind=rewind), []
    for part in torch.tensor(ids).split(chunks):
        session.feed(part.tolist())
        logits.append(session.advance(len(part)))
    return (torch.cat(logits) - theirs(torch.tensor([ids])).logits[0].float()).abs().max().item()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_logits_from_the_cache_equal_transformers_full_forward_pass(
    both: Both, ids: Tensor, chunks: list[int], changes: dict[str, Any]
):
    """Three windows long; matrices of standard deviation 1, so that caps bend scores and logits."""
    ours, theirs = both(**changes)
    assert difference(ours, theirs, ids[0].tolist(), chunks) < 1e-4
    assert difference(ours, theirs, ids[1].tolist(), chunks, rewind=3) < 1e-4


@pytest.mark.parametrize(
    "broken",
    [{"cap": None}, {"cap": 30.0}, {"scale": 12**-0.5}, {"window": 7}, {"window": 9}, {"window": None}],
    ids=str,
)
@pytest.mark.parametrize(
    "chunks", [CHUNKS["turns"], CHUNKS["token by token"]], ids=["turns", "token by token"]
)
def test_those_logits_tell_when_attention_to_the_cache_is_broken(
    both: Both, ids: Tensor, monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any], chunks: list[int]
):
    """Each feature once, in ours; the ring has slack, or a wider window would find nothing to look at."""
    ours, theirs = both()

    def wrong(*args: Any, **options: Any) -> Tensor:
        local = options["window"] is not None
        return remembered(*args, **options | ({} if "window" in broken and not local else broken))

    assert difference(ours, theirs, ids[0].tolist(), chunks, rewind=4) < 1e-4
    monkeypatch.setattr(gemma, "remembered", wrong)
    assert difference(ours, theirs, ids[0].tolist(), chunks, rewind=4) > 1e-2


@pytest.mark.parametrize(
    "changes", [{"final_softcap": None}, {"final_softcap": 50.0}, {"window": 9}, {"window": 7}], ids=str
)
def test_those_logits_tell_when_the_model_is_another(both: Both, ids: Tensor, changes: dict[str, Any]):
    ours, theirs = both()
    other = Gemma(ours.config.but(**changes))
    other.load_state_dict(ours.state_dict())
    assert difference(other, theirs, ids[0].tolist(), CHUNKS["turns"]) > 1e-2


def generated(theirs: Any, prompt: list[int], count: int) -> list[int]:
    """Transformers' own greedy decoding, with its own cache."""
    tensor = torch.tensor([prompt])
    told = theirs.generate(
        tensor,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        attention_mask=torch.ones_like(tensor),
    )
    return told[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [1, 5, 7, 8, 9, 17])
def test_greedy_ids_equal_transformers_generate(both: Both, ids: Tensor, length: int):
    """From inside the first window to beyond the third, by all three engines."""
    ours, theirs = both(speaks=True, seed=1)
    prompt, sampling = ids[0, :length].tolist(), Sampling(max_tokens=22, stop_ids=())
    expected = generated(theirs, prompt, 22)
    for session in (Session(ours), SpeculativeSession(ours, ours.with_window(3), lookahead=3)):
        session.feed(prompt)
        assert [token.id for token in session.decode(sampling)] == expected
    assert len(set(expected)) > 8


def test_a_batch_of_ragged_prompts_equals_transformers_generate(
    both: Both, ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", 4)
    ours, theirs = both(speaks=True, seed=1)
    batch, sampling = Scheduler(ours), Sampling(max_tokens=22, stop_ids=())
    requests = [
        batch.submit(ids[row, :length].tolist(), sampling)
        for row, length in ((0, 3), (1, 17), (1, 9), (0, 1))
    ]
    for _ in batch.run():
        pass
    for request in requests:
        assert [token.id for token in request.tokens] == generated(theirs, list(request.prompt), 22)


def test_a_prompt_read_in_chunks_has_transformers_logits(
    both: Both, ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 5)
    ours, theirs = both()
    session = Session(ours)
    session.feed(ids[0].tolist())
    with torch.no_grad():
        expected = theirs(ids[:1]).logits[0, -1].float()
    torch.testing.assert_close(session.advance()[0], expected, rtol=0, atol=1e-4)
    assert session.cache.length == 24 == 3 * ours.config.window


def test_log_probabilities_equal_transformers(both: Both, ids: Tensor):
    """Of drawn tokens, under a penalty: what is reported is the model's own."""
    ours, theirs = both(speaks=True, seed=1)
    session = Session(ours)
    session.feed(ids[0, :5].tolist())
    sampling = Sampling(
        max_tokens=20, temperature=1.5, top_k=9, repetition_penalty=1.2, seed=3, stop_ids=(), logprobs=5
    )
    tokens = list(session.decode(sampling))
    with torch.no_grad():
        full = theirs(torch.tensor([session.ids])).logits[0].float().log_softmax(-1)
    for place, token in enumerate(tokens, start=4):
        assert token.logprob == pytest.approx(full[place, token.id].item(), abs=1e-4)
        told = torch.tensor([value for _, value in token.top])
        torch.testing.assert_close(told, full[place].topk(5).values, rtol=0, atol=1e-4)
