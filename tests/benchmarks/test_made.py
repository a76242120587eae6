"""Multiple-choice items: well formed, fair, the same for the same seed, and strict on disk."""

import random
from collections import Counter
from pathlib import Path

import pytest

from gemwright.benchmarks.made import LEAST_ITEMS, Item, Task, build_tasks


def code(seed: int) -> str:
    """A module of invented functions, its lines as long as code's."""
    draw = random.Random(seed)
    names = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(4, 9))) for _ in range(40)]
    text = ""
    for _ in range(30):
        one, two, three, four = draw.sample(names, 4)
        text += f"def {one}({two}, {three}=None):\n    {four} = {two}.{draw.choice(names)}({three})\n"
        text += f"    if {four} is not {draw.choice(names)}:\n        return {one}({four}, {two})\n"
        text += f"    return {three}\n\n\n"
    return text


def prose(seed: int) -> str:
    """Paragraphs of invented sentences, each paragraph one long line."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdeilnorst", k=draw.randint(2, 9))) for _ in range(300)]
    paragraphs = [
        " ".join(" ".join(draw.choices(words, k=draw.randint(5, 12))).capitalize() + "." for _ in range(9))
        for _ in range(12)
    ]
    return "\n\n".join(paragraphs)


TEXTS = {"code": [code(n) for n in range(12)], "prose": [prose(100 + n) for n in range(12)]}
TASKS = {kind: build_tasks(texts, items=60, seed=1) for kind, texts in TEXTS.items()}


@pytest.fixture(params=["code", "prose"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def source(kind: str, item: Item) -> int:
    """The text that a context and its answer were taken from."""
    whole = item.context + item.choices[item.answer]
    return next(number for number, text in enumerate(TEXTS[kind]) if whole in text)


def test_there_are_three_tasks_of_the_size_asked_for(kind: str) -> None:
    assert [task.name for task in TASKS[kind]] == ["continuation", "same_document", "word"]
    assert [len(task.items) for task in TASKS[kind]] == [60, 60, 60]


def test_the_answer_is_what_the_text_says(kind: str) -> None:
    for task in TASKS[kind]:
        for item in task.items:
            assert source(kind, item) >= 0


def test_answers_stand_in_each_place_equally_often(kind: str) -> None:
    for task in TASKS[kind]:
        assert Counter(item.answer for item in task.items) == {0: 15, 1: 15, 2: 15, 3: 15}


def test_no_choice_begins_with_another(kind: str) -> None:
    for task in TASKS[kind]:
        for item in task.items:
            choices = [choice.strip() for choice in item.choices]
            assert not any(a.startswith(b) for a in choices for b in choices if a is not b)


def test_no_context_is_asked_twice(kind: str) -> None:
    for task in TASKS[kind]:
        assert len({item.context for item in task.items}) == len(task.items)


def test_passages_are_of_similar_length(kind: str) -> None:
    for task in TASKS[kind][:2]:
        for item in task.items:
            lengths = [len(choice) for choice in item.choices]
            assert 60 <= min(lengths) <= max(lengths) <= 100
            assert max(lengths) - min(lengths) <= 20


def test_contexts_are_long_enough_to_tell_something(kind: str) -> None:
    for task in TASKS[kind]:
        assert all(99 <= len(item.context) <= 200 for item in task.items)


def test_code_is_cut_at_lines() -> None:
    for task in TASKS["code"][:2]:
        assert all(item.context.endswith("\n") for item in task.items)


def test_prose_is_cut_at_sentences() -> None:
    for task in TASKS["prose"][:2]:
        assert all(item.context.endswith((".", "\n")) for item in task.items)


def test_a_long_sentence_is_cut_after_a_word() -> None:
    texts = [" ".join(prose(n).replace(".", ",").lower().split(", ")) + "." for n in range(5)]
    texts = [". ".join(text[start : start + 250] for start in range(0, len(text), 250)) for text in texts]
    words = {word for text in texts for word in text.split()}
    for task in build_tasks(texts, items=20)[:2]:
        assert all(choice.split()[-1] in words for item in task.items for choice in item.choices)


def test_continuations_come_from_four_documents(kind: str) -> None:
    for item in TASKS[kind][0].items:
        homes = {next(n for n, text in enumerate(TEXTS[kind]) if choice in text) for choice in item.choices}
        assert len(homes) == 4


def test_same_document_choices_come_from_one_document(kind: str) -> None:
    for item in TASKS[kind][1].items:
        text = TEXTS[kind][source(kind, item)]
        assert all(choice in text for choice in item.choices)


def test_the_word_stands_in_its_context(kind: str) -> None:
    for item in TASKS[kind][2].items:
        assert item.choices[item.answer].strip() in item.context


def test_words_are_of_similar_length_and_from_the_document_where_possible(kind: str) -> None:
    here = total = 0
    for item in TASKS[kind][2].items:
        answer = item.choices[item.answer]
        assert all(abs(len(choice) - len(answer)) <= 2 for choice in item.choices)
        here += sum(choice.strip() in TEXTS[kind][source(kind, item)] for choice in item.choices)
        total += len(item.choices)
    assert here > 0.9 * total


def test_a_lone_space_belongs_to_the_choices(kind: str) -> None:
    """Tokenizers join it with the word, so a context that ends in it would be read in other pieces."""
    for item in TASKS[kind][2].items:
        assert not item.context.endswith(" ") or item.context.endswith(("  ", "\n "))
        assert len({choice.startswith(" ") for choice in item.choices}) == 1


def test_the_same_seed_gives_the_same_items_and_another_seed_others(kind: str) -> None:
    first, again, other = (build_tasks(TEXTS[kind][:5], items=20, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(other, again, strict=True))


def test_fewer_items_where_the_text_has_no_more() -> None:
    tasks = build_tasks([text[:3_000] for text in TEXTS["prose"][:5]], items=10_000)
    assert all(LEAST_ITEMS <= len(task.items) < 10_000 for task in tasks)


@pytest.mark.parametrize(
    "texts",
    [[], ["too short"] * 9, [text[:2_000] for text in TEXTS["code"][:2]]],
    ids=["none", "short", "two documents"],
)
def test_too_little_text_is_an_error_with_a_remedy(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"continuation: .* Hold out more text, in 4 documents or more"):
        build_tasks(texts)


def test_a_task_survives_the_disk(kind: str, tmp_path: Path) -> None:
    for task in TASKS[kind]:
        assert Task.load(task.save(tmp_path)) == task


def test_unusual_line_ends_inside_items_survive_the_disk(tmp_path: Path) -> None:
    task = Task(name="odd", items=(Item(context="a\u2028b\r\nc\x85", choices=("\n", "\r"), answer=1),))
    assert Task.load(task.save(tmp_path)) == task


GOOD = '{"context": "c", "choices": ["a", "b"], "answer": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD[:-1], "cut short"),
        (GOOD + "{}\n", "line 2: .*context"),
        (GOOD + "[]\n", "line 2"),
        (GOOD + "\n", "line 2"),
        (GOOD.replace("context", "contxt"), "Did you mean 'context'"),
        (GOOD.replace("1", "2"), "answer=2 is no place among 2 choices"),
        (GOOD.replace("1", '"1"'), "answer"),
        (GOOD.replace('"b"', '"a"'), "distinct"),
        (GOOD.replace('"b"', '""'), "not empty"),
        ("", "items"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Task.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no task at"):
        Task.load(tmp_path / "none.jsonl")
