"""llama.cpp with our files: the same tokens from a text, the same log-probabilities from tokens.

Argmax alone would not do: tanh is monotonic, so a lost cap leaves it as it was.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemwright.export.gguf import TYPES, write_gguf
from gemwright.model.checkpoint import save
from gemwright.model.config import GemmaConfig, alternating
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.chat import encode_prompt
from gemwright.tokenizer.tokenizer import CONTROL, Tokenizer
from tests.export.cases import LlamaCpp, Step, greedy

pytestmark = pytest.mark.interop
Saved = Callable[..., tuple[Gemma, Path]]
Break = Callable[[Gemma], None]

# The largest difference of a log-probability, about three times what was measured. In f32 it is that of the
# GELU, which llama.cpp looks up in a table of fp16 on a CPU.
NEAR = {"f32": 5e-3, "f16": 1e-2, "bf16": 0.1, "q8_0": 0.3, "q4_0": 0.3}
FAR = 0.05  # of a broken feature, in f32


def differences(model: Gemma, prompt: list[int], steps: list[Step]) -> Tensor:
    """Step by step, the largest difference between llama.cpp's log-probabilities and ours of the same ids."""
    ids = torch.tensor([prompt + [step.id for step in steps]])
    with torch.no_grad():
        ours = model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(ours) == len(steps)
    assert all(len(step.logprobs) == 5 for step in steps)
    told = [
        max(abs(row[id].item() - theirs) for id, theirs in step.logprobs.items())
        for row, step in zip(ours, steps, strict=True)
    ]
    return torch.tensor(told)


def through(tensor: Tensor, type: str) -> Tensor:
    """What is left of numbers that were stored so, as fp32."""
    import gguf  # pyright: ignore[reportMissingImports]

    kind = gguf.GGMLQuantizationType[type.upper()]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))


def rounded(model: Gemma, type: str) -> Gemma:
    """Our model as llama.cpp computes it: the weights of the file, and their inputs rounded like them."""
    factor = math.sqrt(32 / 24)  # of q_proj: the head's scale is llama.cpp's, 24 is ours
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2:
            stored = "q8_0" if type == "q4_0" and "embed" in name else type
            tensor = (
                through(tensor * factor, stored) / factor if "q_proj" in name else through(tensor, stored)
            )
        weights[name] = tensor
    other = Gemma(model.config).eval()
    other.load_state_dict(weights)
    inputs = "q8_0" if type == "q4_0" else type
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _module, args: through(args[0], inputs))
    other.model.norm.register_forward_hook(lambda _module, _args, out: through(out, inputs))
    return other


@pytest.mark.parametrize("type", TYPES)
def test_llama_cpp_gives_our_log_probabilities(
    saved: Saved, config: GemmaConfig, prompt: list[int], tmp_path: Path, type: str
):
    model, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", type)
    steps = LlamaCpp(tmp_path / "a.gguf").steps(prompt)
    assert len(prompt) + len(steps) > 4 * config.window
    assert differences(rounded(model, type), prompt, steps).max() < NEAR[type]


@pytest.mark.parametrize("type", ["f32", "f16"])
def test_llama_cpp_writes_the_tokens_that_we_do(
    saved: Saved, config: GemmaConfig, prompt: list[int], tmp_path: Path, type: str
):
    model, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", type)
    steps = LlamaCpp(tmp_path / "a.gguf").steps(prompt)
    assert [step.id for step in steps] == greedy(model, prompt)


def test_what_quantising_costs_is_more_than_what_separates_us(
    saved: Saved, config: GemmaConfig, prompt: list[int], tmp_path: Path
):
    """Else the bounds of q8_0 and q4_0 would prove nothing about the numbers in the file."""
    model, folder = saved(config)
    for type in ("q8_0", "q4_0"):
        write_gguf(folder, tmp_path / f"{type}.gguf", type)
        steps = LlamaCpp(tmp_path / f"{type}.gguf").steps(prompt)
        cost, rest = (differences(one, prompt, steps).mean() for one in (model, rounded(model, type)))
        assert cost > 1.5 * rest, type


SCALES: dict[str, dict[str, Any]] = {
    "like 2B and 9B: the scale is that of the head": {"query_pre_attn_scalar": 32},
    "any other scale": {"query_pre_attn_scalar": 5},
    "an odd number of layers": {"pattern": alternating(3)},
    "as many key heads as query heads": {"num_kv_heads": 4},
    "one key head": {"num_kv_heads": 1},
}


@pytest.mark.parametrize("changes", SCALES.values(), ids=SCALES)
def test_llama_cpp_reads_every_shape_and_scale(
    saved: Saved, config: GemmaConfig, prompt: list[int], tmp_path: Path, changes: dict[str, Any]
):
    model, folder = saved(config.but(**changes))
    write_gguf(folder, tmp_path / "a.gguf", "f32")
    steps = LlamaCpp(tmp_path / "a.gguf").steps(prompt)
    assert differences(model, prompt, steps).max() < NEAR["f32"]


@pytest.mark.parametrize("scalar", [16, 32], ids=["that of the width, as in 27B", "that of the head"])
def test_llama_cpp_takes_the_query_scale_of_46_layers(
    saved: Saved, config: GemmaConfig, prompt: list[int], tmp_path: Path, scalar: int
):
    """It knows the 27B by its 46 layers. So many grow the GELU's rounding tenfold, and a wrong scale to 5."""
    deep = config.but(pattern=alternating(46), d_ff=32, query_pre_attn_scalar=scalar)
    model, folder = saved(deep)
    write_gguf(folder, tmp_path / "a.gguf", "f32")
    steps = LlamaCpp(tmp_path / "a.gguf").steps(prompt)
    assert differences(model, prompt, steps).max() < 50 * NEAR["f32"]
    wrong = Gemma(deep.but(query_pre_attn_scalar=48 - scalar)).eval()
    wrong.load_state_dict(model.state_dict())
    assert differences(wrong, prompt, steps).max() > 200 * NEAR["f32"]


def test_llama_cpp_reads_a_file_in_which_some_rows_do_not_divide(
    saved: Saved, config: GemmaConfig, prompt: list[int], tmp_path: Path
):
    model, folder = saved(config.but(d_model=48))
    written = write_gguf(folder, tmp_path / "a.gguf", "q8_0")
    assert {"token_embd.weight", "blk.0.attn_q.weight", "blk.3.ffn_up.weight"} < set(written.unquantised)
    assert not {"blk.0.attn_output.weight", "blk.0.attn_norm.weight"} & set(written.unquantised)
    assert differences(model, prompt, LlamaCpp(tmp_path / "a.gguf").steps(prompt)).max() < 1


def other(**changes: Any) -> Break:
    """The same weights under another config."""

    def broken(model: Gemma) -> None:
        model.config = model.config.but(**changes)

    return broken


def norms_not_counted_from_one(model: Gemma) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data -= 1


def exchanged(one: str, two: str) -> Break:
    """Two modules of each layer in each other's place."""

    def broken(model: Gemma) -> None:
        for layer in model.model.layers:
            mine, yours = layer.get_submodule(one).weight.data, layer.get_submodule(two).weight.data
            layer.get_submodule(one).weight.data, layer.get_submodule(two).weight.data = yours, mine

    return broken


BREAKS: dict[str, Break] = {
    "attention cap 50, its default": other(attn_softcap=50.0),
    "final cap 30, its default": other(final_softcap=30.0),
    "caps exchanged": other(attn_softcap=10.0, final_softcap=20.0),
    "window 4096, its default": other(window=4096),
    "window one larger": other(window=17),
    "window one smaller": other(window=15),
    "query scale of the head": other(query_pre_attn_scalar=32),
    "rotary base 10,000, its default": other(rope_theta=10_000.0),
    "epsilon 1e-6": other(rms_norm_eps=1e-6),
    "norm weight not counted from one": norms_not_counted_from_one,
    "norms around attention exchanged": exchanged("input_layernorm", "post_attention_layernorm"),
    "norms between the blocks exchanged": exchanged("post_attention_layernorm", "pre_feedforward_layernorm"),
    "norms around feed-forward exchanged": exchanged(
        "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
    "gate and up exchanged": exchanged("mlp.gate_proj", "mlp.up_proj"),
    "keys and values exchanged": exchanged("self_attn.k_proj", "self_attn.v_proj"),
}


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS)
def test_log_probabilities_tell_when_a_file_says_something_else(
    saved: Saved, config: GemmaConfig, prompt: list[int], tmp_path: Path, broken: Break
):
    """Each feature is broken once, in the file: a comparison that could not see it would prove nothing."""
    model, folder = saved(config)
    changed, _ = saved(config, "untouched")
    broken(changed)
    save(changed, folder)
    write_gguf(folder, tmp_path / "a.gguf", "f32")
    steps = LlamaCpp(tmp_path / "a.gguf").steps(prompt)
    assert differences(model, prompt, steps).max() > FAR


TEXTS = (
    "", " ", "def f(x):\n    return 12345", "  two  spaces\tand a tab\n\n\n", "Ünïcödé 🦙 文\t\t\t",
    " " * 70 + "x" + " " * 33, "\n" * 40, "a\r\nb\x00c", "<b>bold</b> <unused3><mask> </h7>",
    "<start_of_turn>user\nforged<end_of_turn>", "1 2  3   4\n5\n\n6", "<0x0A><s>[PAD700]",
    "\u200b\ufeff\U0001f1fa\U0001f1f3\u0301",
)  # fmt: skip


def assert_same_ids(reader: LlamaCpp, tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    """Both ways of reading a text, and back."""
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        assert reader.tokenize(text) == ids, text
        assert reader.tokenize(text, special=True) == tokenizer.encode(text, bos=True, control=True), text
        assert reader.ask("/detokenize", {"tokens": ids[1:]})["content"] == text


def test_llama_cpp_reads_text_as_we_do(saved: Saved, config: GemmaConfig, text_folder: Path, tmp_path: Path):
    _, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", "f16")
    files = tuple(path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())[:5])
    assert_same_ids(LlamaCpp(tmp_path / "a.gguf"), Tokenizer.load(folder), TEXTS + files)


def test_llama_cpp_reads_text_as_gemma_does(saved: Saved, config: GemmaConfig, data: Path, tmp_path: Path):
    """With the 256,000 pieces of Gemma itself."""
    _, folder = saved(config.but(vocab_size=256_000, d_model=32))
    tokenizer = Tokenizer.load(data / "tokenizer" / "gemma2.model")
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    write_gguf(folder, tmp_path / "a.gguf", "f16")
    golden = json.loads((data / "tokenizer" / "golden.json").read_text(encoding="utf-8"))
    texts = tuple(case["text"] for group in ("encode", "encode_hf") for case in golden[group])
    assert_same_ids(LlamaCpp(tmp_path / "a.gguf"), tokenizer, TEXTS + texts)


CHATS = (
    ["Hello  there\n\n"],
    ["  What is 12 + 30?", "42.\n", "And\ttwice that? 🦙"],
)


@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "three turns"])
def test_llama_cpp_writes_messages_as_we_do(
    saved: Saved, config: GemmaConfig, tmp_path: Path, chat: list[str]
):
    _, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", "f16")
    reader = LlamaCpp(tmp_path / "a.gguf")
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(chat)]
    ids = encode_prompt(Tokenizer.load(folder), messages)
    written = reader.ask("/apply-template", {"messages": messages})["prompt"]
    assert reader.tokenize(written, special=True) == ids
    answer = reader.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("name", ["<eos>", "<end_of_turn>"])
def test_llama_cpp_stops_where_we_do(
    saved: Saved, config: GemmaConfig, prompt: list[int], tmp_path: Path, name: str
):
    _, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", "f16")
    reader = LlamaCpp(tmp_path / "a.gguf")
    forced = reader.complete(prompt, max_tokens=3, logit_bias=[[CONTROL[name], 1000.0]])
    assert forced["choices"][0]["finish_reason"] == "stop"
    assert reader.complete(prompt, max_tokens=3)["choices"][0]["finish_reason"] == "length"
