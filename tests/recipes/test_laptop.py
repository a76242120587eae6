"""The laptop recipe's configs fit each other, and what it cannot work with it refuses at once."""

from pathlib import Path

import pytest

from gemwright.model import cost
from gemwright.recipes import laptop


def test_the_teacher_is_at_least_four_times_the_student():
    teacher, student = (config.model for config in (laptop.teacher(), laptop.student(0, 1e-3)))
    assert cost.parameters(teacher) >= 4 * cost.parameters(student)
    assert cost.non_embedding_parameters(teacher) >= 4 * cost.non_embedding_parameters(student)


def test_teacher_student_and_tokenizer_have_one_vocabulary():
    sizes = {config.model.vocab_size for config in (laptop.teacher(), laptop.student(0, 1e-3))}
    assert sizes == {laptop.tokenizer().vocab_size}


def test_rows_fit_the_models_and_are_longer_than_a_window():
    for config in (laptop.teacher(), laptop.student(0, 1e-3)):
        assert config.model.window < config.train.seq_len <= config.model.max_seq_len


def test_the_teacher_reads_more_text_than_the_student_sees():
    teacher, student = laptop.teacher(), laptop.student(0, 1e-3)
    assert teacher.max_tokens is not None
    assert student.max_tokens is not None
    assert teacher.max_tokens > student.max_tokens


def test_a_seed_changes_weights_and_order_and_nothing_else():
    one, other = laptop.student(0, 1e-3), laptop.student(7, 1e-3)
    assert one.but(seed=7, **{"train.seed": 7}) == other


def test_a_rate_changes_the_rate_and_nothing_else():
    assert laptop.student(0, 1e-3).but(**{"train.optim.lr": 2e-3}) == laptop.student(0, 2e-3)


def test_the_same_arguments_give_the_same_config():
    assert laptop.student(1, 1e-3) == laptop.student(1, 1e-3)
    assert laptop.teacher() == laptop.teacher()


def test_a_corpus_that_holds_the_runs_is_refused(text_folder: Path):
    with pytest.raises(ValueError, match="Move one of them"):
        laptop.run(text_folder / "runs/laptop", text_folder)
    assert not (text_folder / "runs").exists()


def test_too_little_text_is_refused_before_anything_is_trained(tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("too short")
    with pytest.raises(ValueError, match="Add text"):
        laptop.run(tmp_path / "runs", tmp_path / "text")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["curated"]
