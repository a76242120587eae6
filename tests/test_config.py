"""Configs: strict doors, changes that are validated, and errors that say what to do."""

import json
import math
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from gemwright.config import Config, differences, nearest, parse_settings


class Schedule(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"


class Optim(Config):
    lr: float = Field(default=1e-3, gt=0)
    schedule: Schedule = Schedule.COSINE
    betas: tuple[float, float] = (0.9, 0.95)


class Source(Config):
    path: Path
    weight: float = 1.0


class Recipe(Config):
    steps: int = Field(default=10, ge=1)
    warmup: int = 2
    name: str = "small"
    shuffle: bool = True
    optim: Optim = Optim()
    ema: Optim | None = None
    sources: tuple[Source, ...] = ()
    by_name: dict[str, Source] = Field(default_factory=dict[str, Source])

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Recipe":
        if self.warmup > self.steps:
            raise ValueError(f"warmup={self.warmup} exceeds steps={self.steps}. Use fewer warm-up steps.")
        return self


def test_what_to_dict_gives_is_json_and_parses_back_to_the_same_config():
    recipe = Recipe(
        optim=Optim(lr=3e-4, schedule=Schedule.LINEAR),
        ema=Optim(),
        sources=(Source(path=Path("a/b"), weight=0.5), Source(path=Path("c"))),
        by_name={"web": Source(path=Path("d"))},
    )
    assert Recipe.parse(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.to_dict()["optim"] == {"lr": 3e-4, "schedule": "linear", "betas": [0.9, 0.95]}


@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(2, 2**62), st.text())
def test_no_number_and_no_text_is_changed_on_the_way_to_json_and_back(lr: float, steps: int, name: str):
    recipe = Recipe(steps=steps, name=name, optim=Optim(lr=lr))
    assert Recipe.parse(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_config_is_frozen_and_hashable():
    optim = Optim()
    with pytest.raises(ValidationError, match="frozen"):
        optim.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert {optim: 1}[Optim()] == 1


@pytest.mark.parametrize(
    ("data", "path", "hint"),
    [
        ({"step": 3}, "step", "Did you mean 'steps'?"),
        ({"optim": {"learning": 1}}, "optim.learning", "Known: betas, lr, schedule."),
        ({"optim": {"beta": [0, 1]}}, "optim.beta", "Did you mean 'betas'?"),
        ({"ema": {"lrr": 1}}, "ema.lrr", "Did you mean 'lr'?"),
        (
            {"sources": [{"path": "a"}, {"path": "b", "weigt": 1}]},
            "sources.1.weigt",
            "Did you mean 'weight'?",
        ),
        ({"by_name": {"web": {"path": "b", "url": 1}}}, "by_name.web.url", "Known: path, weight."),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_key_there(
    data: dict[str, object], path: str, hint: str
):
    with pytest.raises(ValueError, match="unknown key") as error:
        Recipe.parse(data)
    assert str(error.value) == f"Recipe: unknown key {path!r}. {hint}"


@pytest.mark.parametrize(
    "data",
    [{"steps": "3"}, {"steps": True}, {"steps": 3.0}, {"shuffle": 1}, {"shuffle": "yes"}, {"name": 5}],
)
def test_parse_takes_no_type_for_another(data: dict[str, object]):
    with pytest.raises(ValueError, match=rf"^Recipe: {next(iter(data))}: Input should be .*\(got "):
        Recipe.parse(data)


def test_a_whole_number_is_good_enough_for_a_float():
    assert Optim.parse({"lr": 1}).lr == 1.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_config_holds_an_infinity_or_nan(value: float):
    with pytest.raises(ValueError, match="finite"):
        Source.parse({"path": "a", "weight": value})
    with pytest.raises(ValueError, match="finite"):
        Source(path=Path("a"), weight=value)


def test_defaults_are_validated_too():
    class Wrong(Config):
        steps: int = Field(default=0, ge=1)

    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Wrong()


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(ValueError, match="Recipe: ") as error:
        Recipe.parse({"steps": 0, "optim": {"lr": -1}, "naame": "x"})
    assert all(part in str(error.value) for part in ("steps: ", "optim.lr: ", "Did you mean 'name'?"))


def test_a_missing_key_is_named_without_a_dump_of_the_rest():
    with pytest.raises(ValueError, match="required") as error:
        Recipe.parse({"sources": [{"weight": 2.0}]})
    assert str(error.value) == "Recipe: sources.0.path: Field required"


def test_a_rule_across_fields_speaks_in_its_own_words():
    with pytest.raises(ValueError, match="exceeds") as error:
        Recipe.parse({"warmup": 20})
    assert str(error.value) == "Recipe: warmup=20 exceeds steps=10. Use fewer warm-up steps."


def test_but_changes_nested_fields_and_leaves_the_original():
    recipe = Recipe(ema=Optim())
    other = recipe.but(steps=20, **{"optim.lr": 0.5, "ema.schedule": "linear"})
    assert (other.steps, other.optim.lr) == (20, 0.5)
    assert other.ema == Optim(schedule=Schedule.LINEAR)
    assert recipe == Recipe(ema=Optim())


def test_but_takes_configs_enums_paths_and_tuples_as_they_are():
    changed = Recipe().but(optim=Optim(schedule=Schedule.LINEAR), sources=(Source(path=Path("a")),))
    assert changed == Recipe(optim=Optim(schedule=Schedule.LINEAR), sources=(Source(path=Path("a")),))
    assert Source(path=Path("a")).but(path=Path("b")) == Source(path=Path("b"))


def test_but_with_no_change_gives_an_equal_config():
    recipe = Recipe(ema=Optim(lr=0.1), sources=(Source(path=Path("a")),))
    assert recipe.but() == recipe


def test_but_validates_anew_also_across_fields():
    with pytest.raises(ValueError, match="warmup=2 exceeds steps=1"):
        Recipe().but(steps=1)
    with pytest.raises(ValueError, match=r"optim\.lr: .*greater than 0"):
        Recipe().but(**{"optim.lr": 0})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("stepz", "stepz: Recipe has no setting 'stepz'. Did you mean 'steps'?"),
        ("optim.rl", "optim.rl: Optim has no setting 'rl'. Known: betas, lr, schedule."),
        ("optimm.lr", "optimm.lr: Recipe has no setting 'optimm'. Did you mean 'optim'?"),
        ("steps.lr", "steps.lr: 'steps' is 10, not a group of settings"),
        ("ema.lr", "ema.lr: 'ema' is None, not a group of settings"),
        ("sources.path", "sources.path: 'sources' is (), not a group of settings"),
    ],
)
def test_but_refuses_a_path_that_leads_nowhere(path: str, words: str):
    with pytest.raises(ValueError, match="setting") as error:
        Recipe().but(**{path: 1})
    assert str(error.value).startswith(words)


def test_settings_are_json_where_they_can_be_and_text_otherwise():
    told = [
        "optim.lr=1e-3",
        "seed=2",
        "on=true",
        "ema=null",
        "name=plain text",
        'sources=[{"path": "a"}]',
        "eq=a=b",
    ]
    assert parse_settings(told) == {
        "optim.lr": 0.001,
        "seed": 2,
        "on": True,
        "ema": None,
        "name": "plain text",
        "sources": [{"path": "a"}],
        "eq": "a=b",
    }


def test_an_empty_value_is_empty_text():
    assert parse_settings(["name="]) == {"name": ""}


def test_the_last_of_two_settings_wins():
    assert parse_settings(["seed=1", "seed=2"]) == {"seed": 2}


@pytest.mark.parametrize("setting", ["optim.lr", "=3", ""])
def test_a_setting_without_name_or_value_is_refused_with_an_example(setting: str):
    with pytest.raises(ValueError, match=r"path=value, as in --set optim\.lr=0\.001"):
        parse_settings([setting])


def test_settings_from_the_command_line_reach_the_config():
    recipe = Recipe().but(
        **parse_settings(["optim.lr=1e-2", "optim.schedule=linear", 'sources=[{"path": "a"}]'])
    )
    assert recipe.optim == Optim(lr=0.01, schedule=Schedule.LINEAR)
    assert recipe.sources == (Source(path=Path("a")),)


def test_nearest_points_to_one_name_or_lists_all():
    assert nearest("tempertur", ["temperature", "top_p"]) == "Did you mean 'temperature'?"
    assert nearest("zzz", ["top_p", "temperature"]) == "Known: temperature, top_p."


def test_differences_name_the_path_the_old_and_the_new():
    old = {"a": 1, "b": {"c": 2, "d": 3}, "gone": 0}
    new = {"a": 1, "b": {"c": 5, "d": 3}, "here": None}
    assert differences(old, new) == ["b.c: 2 -> 5", "gone: 0 -> (absent)", "here: (absent) -> None"]
    assert differences(old, old) == []
    assert differences({"a": {"b": 1}}, {"a": None}) == ["a: {'b': 1} -> None"]
