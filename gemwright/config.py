"""Frozen, typed configs: JSON in, JSON out, `--set a.b=1`; an unknown key is an error that names the nearest.

Every config of the house derives from `Config` and lives beside its owner. A config is never patched: a
change rebuilds it through validation, so a config that exists is a config that is allowed.
"""

import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

# Not Self: the shape checker refuses it outside a class that it decorates as a whole.
C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every config: frozen, hashable, no unknown keys, no infinities; defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def parse(cls: type[C], data: Mapping[str, Any]) -> C:
        """Build from plain data, by JSON's types: no text becomes a number, no number a truth value.

        Raises ValueError that names every wrong key and what it should have been.
        """
        try:
            return cls.model_validate_json(to_json(dict(data)), strict=True)
        except ValidationError as error:
            wrong = "; ".join(_explain(cls, item) for item in error.errors())
            raise ValueError(f"{cls.__name__}: {wrong}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `parse` reads back and JSON can hold."""
        return self.model_dump(mode="json")

    def but(self: C, **changes: Any) -> C:
        """This config with some fields changed, validated anew. Nested: `but(**{"optim.lr": 1e-3})`."""
        data = self.model_dump()
        for path, value in changes.items():
            node: dict[str, Any] = data
            *parents, last = path.split(".")
            kind: Any = type(self)
            for name in parents:
                _require(kind, name, path)
                kind = _config_type(kind.model_fields[name].annotation)
                if kind is None or not isinstance(node[name], dict):
                    raise ValueError(
                        f"{path}: {name!r} is {node[name]!r}, not a group of settings, so {last!r} cannot be "
                        f"set inside it. Set {name!r} as a whole; its value may be JSON."
                    )
                node = node[name]
            _require(kind, last, path)
            node[last] = value.model_dump() if isinstance(value, BaseModel) else value
        return type(self).parse(data)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=1e-3", "seed=2"]` -> `{"optim.lr": 0.001, "seed": 2}`; what is not JSON is text."""
    changes: dict[str, Any] = {}
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator or not path:
            raise ValueError(f"--set {setting!r} is not of the form path=value, as in --set optim.lr=0.001.")
        try:
            changes[path] = json.loads(text)
        except json.JSONDecodeError:
            changes[path] = text
    return changes


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that points from an unknown name to the nearest known one, or lists them all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else "Known: " + ", ".join(names) + "."


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two plain configs, one `path: old -> new` a line."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        a: Any = old.get(key, "(absent)")
        b: Any = new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            inner = typing.cast("tuple[dict[str, Any], dict[str, Any]]", (a, b))
            lines += differences(*inner, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def _config_type(annotation: Any) -> type[Config] | None:
    """The first Config class inside an annotation such as `OptimConfig | None` or `tuple[Source, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    inner = map(_config_type, typing.get_args(annotation))
    return next((kind for kind in inner if kind), None)


def _require(kind: type[Config], name: str, path: str) -> None:
    known = kind.model_fields
    if name not in known:
        raise ValueError(f"{path}: {kind.__name__} has no setting {name!r}. {nearest(name, known)}")


def _explain(cls: type[Config], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {path!r}. {nearest(item['loc'][-1], _fields_at(cls, item['loc'][:-1]))}"
    told = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r})"
    return f"{path}: {told}{got}" if path else told


def _fields_at(cls: type[Config], loc: tuple[int | str, ...]) -> Iterable[str]:
    """The names known at a place in a config. A place in a list or dict (`sources.0`) is its element's."""
    kind = cls
    for part in loc:
        if part in kind.model_fields:
            kind = _config_type(kind.model_fields[str(part)].annotation) or kind
    return kind.model_fields
