"""What is refused before anything is written, and what stands in a file."""

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.export import gguf as export
from gemwright.export.gguf import write_gguf
from gemwright.model.checkpoint import save
from gemwright.model.config import Attention, GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.template import END_OF_LAST_ANSWER, TEMPLATE, TEMPLATE_FILE

Saved = Callable[..., tuple[Gemma, Path]]
LOCAL, GLOBAL = Attention.LOCAL, Attention.GLOBAL
interop = pytest.mark.interop


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pattern": (GLOBAL, LOCAL)}, "layers 0, 2, 4, ... of a Gemma 2 for local"),
        ({"pattern": (LOCAL, LOCAL, GLOBAL)}, "Only that pattern can be exported"),
        ({"attn_softcap": None}, "has no attn_softcap"),
        ({"final_softcap": None}, "has no final_softcap"),
        ({"vocab_size": 600}, "has 700 pieces and the model's table 600 rows"),
    ],
    ids=str,
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    saved: Saved, config: GemmaConfig, tmp_path: Path, changes: dict[str, Any], said: str
):
    _, folder = saved(config.but(**changes))
    with pytest.raises(ValueError, match=said):
        write_gguf(folder, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_folder_without_a_tokenizer_is_refused(saved: Saved, config: GemmaConfig, tmp_path: Path):
    _, folder = saved(config)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        write_gguf(folder, tmp_path / "a.gguf")


def test_an_unknown_type_names_the_nearest(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no type 'q8'.*q8_0"):
        write_gguf(tmp_path, tmp_path / "a.gguf", "q8")


def test_a_file_that_exists_is_left_alone(saved: Saved, config: GemmaConfig, tmp_path: Path):
    _, folder = saved(config)
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"exists already\. Choose another --out, or --fresh"):
        write_gguf(folder, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_without_the_library_the_extra_is_named(
    saved: Saved, config: GemmaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, folder = saved(config)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'gemwright\[gguf\]'"):
        write_gguf(folder, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("value", "type", "said"),
    [
        (float("nan"), "f32", "holds nan.*This checkpoint is damaged"),
        (float("inf"), "bf16", "holds inf.*This checkpoint is damaged"),
        (1e5, "f16", "holds 100000, and f16 ends at 65504. Use --type bf16 or f32"),
        (-1e5, "q8_0", "holds 100000, and q8_0 ends at 65504"),
    ],
)
@interop
def test_a_weight_that_the_type_cannot_hold_leaves_everything_as_it_was(
    saved: Saved, config: GemmaConfig, tmp_path: Path, value: float, type: str, said: str
):
    model, folder = saved(config)
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = value
    save(model, folder)
    file = tmp_path / "out" / "a.gguf"
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(ValueError, match=f"layers.2.mlp.up_proj.weight {said}"):
        write_gguf(folder, file, type, fresh=True)
    assert [path.name for path in file.parent.iterdir()] == ["a.gguf"]
    assert file.read_text() == "mine"


@interop
def test_fresh_moves_the_old_file_aside(saved: Saved, config: GemmaConfig, tmp_path: Path):
    _, folder = saved(config)
    (tmp_path / "a.gguf").write_text("mine")
    written = write_gguf(folder, tmp_path / "a.gguf", fresh=True)
    assert (tmp_path / "a.gguf.old-1").read_text() == "mine"
    assert (tmp_path / "a.gguf").stat().st_size == written.bytes


@interop
@pytest.mark.parametrize("type", export.TYPES)
def test_one_file_of_weights_or_many_in_one_block_or_many_give_the_same_bytes(
    saved: Saved, config: GemmaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type: str
):
    _, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", type)
    saved(config, max_shard_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    monkeypatch.setattr(export, "_BLOCK", 1000)
    write_gguf(folder, tmp_path / "b.gguf", type)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@interop
def test_norms_are_stored_in_f32_whatever_the_type(saved: Saved, config: GemmaConfig, tmp_path: Path):
    import gguf

    model, folder = saved(config)
    save(model.bfloat16(), folder)
    for type in export.TYPES:
        write_gguf(folder, tmp_path / f"{type}.gguf", type)
        held = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{type}.gguf").tensors}
        norms = {name: tensor for name, tensor in held.items() if "norm" in name}
        assert len(norms) == 4 * config.num_layers + 1
        assert {tensor.tensor_type.name for tensor in norms.values()} == {"F32"}
        weight = model.model.layers[1].post_feedforward_layernorm.weight.float()
        assert torch.equal(torch.from_numpy(norms["blk.1.post_ffw_norm.weight"].data.copy()), 1 + weight)


@interop
def test_a_file_says_what_it_is(saved: Saved, config: GemmaConfig, tmp_path: Path):
    import gguf

    _, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", "q4_0")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")

    def fact(key: str) -> Any:
        return reader.fields[key].contents()

    assert fact("general.architecture") == "gemma2"
    assert fact("general.name") == folder.name
    assert fact("general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_0
    assert fact("gemma2.context_length") == config.max_seq_len
    assert fact("gemma2.block_count") == 4
    assert fact("tokenizer.ggml.eot_token_id") == 107
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert "output.weight" not in kinds


@interop
def test_rows_that_no_piece_owns_are_unused_and_turns_are_control(
    saved: Saved, config: GemmaConfig, tmp_path: Path
):
    import gguf

    _, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    names = fields["tokenizer.ggml.tokens"].contents()
    kinds = [gguf.TokenType(kind).name for kind in fields["tokenizer.ggml.token_type"].contents()]
    assert len(names) == len(kinds) == config.vocab_size
    assert len(set(names)) == len(names)
    assert set(kinds[700:]) == {"UNUSED"}
    assert {name for name, kind in zip(names, kinds, strict=True) if kind == "CONTROL"} == {
        "<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>",
    }  # fmt: skip
    assert kinds[names.index("   ")] == "USER_DEFINED"


@interop
@pytest.mark.parametrize("where", ["its own file", "tokenizer_config.json", "nowhere"])
def test_the_chat_template_is_the_folders_or_else_ours(
    saved: Saved, config: GemmaConfig, tmp_path: Path, where: str
):
    """A judge such as ShieldGemma has another one than Gemma."""
    import gguf

    _, folder = saved(config)
    (folder / TEMPLATE_FILE).unlink()
    if where == "its own file":
        (folder / TEMPLATE_FILE).write_text("theirs", encoding="utf-8")
    elif where == "tokenizer_config.json":
        (folder / where).write_text(json.dumps({"chat_template": "theirs"}), encoding="utf-8")
    write_gguf(folder, tmp_path / "a.gguf", "f16")
    told = gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.chat_template"].contents()
    assert told == (TEMPLATE.replace(END_OF_LAST_ANSWER, "") if where == "nowhere" else "theirs")


@interop
def test_a_chat_in_the_file_grows_by_its_turns(saved: Saved, config: GemmaConfig, tmp_path: Path):
    """llama-cli sends what a rendering has behind the length of the one before it."""
    import gguf
    from jinja2 import Template

    _, folder = saved(config)
    write_gguf(folder, tmp_path / "a.gguf", "f16")
    told = gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.chat_template"].contents()
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("model", "b"), ("user", "c"))]
    ours, theirs = (
        [Template(text).render(messages=turns[:n], bos_token="<bos>", eos_token="<eos>") for n in (1, 2, 3)]
        for text in (told, TEMPLATE)
    )
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(ours))
    assert not theirs[2].startswith(theirs[1])
