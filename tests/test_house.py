"""The rules of the house, each a sentence that a machine checks."""

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

HOUSE = Path(__file__).parent.parent
PACKAGE = HOUSE / "gemwright"
FILES = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
MODULES = [path for path in FILES if path.suffix == ".py"]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
PYPROJECT: dict[str, Any] = tomllib.loads((HOUSE / "pyproject.toml").read_text(encoding="utf-8"))


def named(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(HOUSE)) for path in paths]


def imported(tree: ast.Module) -> set[str]:
    """The names of all modules that a file imports, and of what it imports from them, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def house_files() -> list[Path]:
    """What belongs to the project: all that git does not ignore."""
    if not (HOUSE / ".git").exists():
        pytest.skip("not a checkout: which files belong to the project is git's to say")
    git = ["git", "-C", str(HOUSE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
    return [HOUSE / name for name in listed if name and (HOUSE / name).is_file()]


def test_the_rules_see_the_package():
    assert {"config.py", "run.py", "device.py"} <= {path.name for path in MODULES}


def test_no_file_of_the_package_is_longer_than_400_lines():
    assert not named([path for path in FILES if len(path.read_bytes().splitlines()) > 400])


def test_a_folder_of_the_package_holds_at_most_7_files():
    folders = {path.parent for path in FILES}
    full = {
        folder: [p for p in FILES if p.parent == folder and p.name != "__init__.py"] for folder in folders
    }
    assert not {str(folder): len(files) for folder, files in full.items() if len(files) > 7}


def test_the_package_is_at_most_2_folders_deep():
    assert not named([path for path in FILES if len(path.relative_to(PACKAGE).parts) > 3])


def test_no_file_is_named_after_nothing_in_particular():
    empty_words = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not named(
        [path for path in FILES if empty_words & set(path.relative_to(PACKAGE).with_suffix("").parts)]
    )


def test_the_package_never_imports_transformers():
    """It is the oracle of the tests, and no dependency."""
    assert not named(
        [p for p, tree in TREES.items() if {n.split(".")[0] for n in imported(tree)} & {"transformers"}]
    )


def test_annotations_stay_objects_so_that_shapes_can_be_checked():
    """Not text, as `from __future__ import annotations` makes them, and not Self, which beartype refuses."""
    refused = {"__future__.annotations", "typing.Self", "typing_extensions.Self"}
    assert not named([path for path, tree in TREES.items() if imported(tree) & refused])


def test_every_module_says_what_it_is():
    assert not named([path for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)])


def test_every_public_function_and_class_says_what_it_is():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [
        (path.relative_to(HOUSE), node)
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    assert public
    assert not [f"{path}:{node.lineno} {node.name}" for path, node in public if not ast.get_docstring(node)]


def test_the_licence_is_the_one_that_is_declared():
    text = (HOUSE / "LICENSE").read_text(encoding="utf-8")
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert PYPROJECT["project"]["license-files"] == ["LICENSE"]
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text)


def test_the_floors_name_what_exists_and_put_the_rest_in_parentheses():
    (contract,) = PYPROJECT["tool"]["importlinter"]["contracts"]
    rooms = [room.strip() for layer in contract["layers"] for room in layer.split("|")]
    built = {path.stem for path in MODULES if path.parent == PACKAGE} - {"__init__"}
    built |= {path.parent.name for path in MODULES if path.parent.parent == PACKAGE}
    assert contract["exhaustive"]
    assert len(rooms) == len(set(rooms))
    assert built == {room for room in rooms if not room.startswith("(")}
    assert not built & {room.strip("()") for room in rooms if room.startswith("(")}


def test_every_dependency_is_pinned():
    lines = (HOUSE / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = PYPROJECT["project"]
    asked = [
        *project["dependencies"],
        *(need for needs in project["optional-dependencies"].values() for need in needs),
    ]
    names = {re.match(r"[\w.-]+", need)[0] for need in asked}  # pyright: ignore[reportOptionalSubscript]
    assert {re.sub("[-_.]+", "-", name).lower() for name in names} <= set(pins)
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", f"{name}=={pin}") for name, pin in pins.items())
    assert not [name for name in pins if name.startswith(("nvidia", "cuda"))]


def test_every_test_file_asserts_something():
    checks = {
        "raises",
        "warns",
        "fail",
        "assert_close",
        "assert_equal",
        "assert_allclose",
        "assert_array_equal",
    }

    def asserts(node: ast.AST) -> bool:
        called = node.func if isinstance(node, ast.Call) else None
        return isinstance(node, ast.Assert) or (isinstance(called, ast.Attribute) and called.attr in checks)

    tests = sorted((HOUSE / "tests").rglob("test_*.py"))
    assert tests
    assert not named(
        [p for p in tests if not any(map(asserts, ast.walk(ast.parse(p.read_text(encoding="utf-8")))))]
    )


def test_links_in_the_documents_lead_somewhere():
    pages = [*HOUSE.glob("*.md"), *(HOUSE / "docs").rglob("*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(<?([^)#>\s]+)", page.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:", link)
    ]
    assert HOUSE / "README.md" in pages
    assert not [
        f"{page.relative_to(HOUSE)}: {link}" for page, link in links if not (page.parent / link).exists()
    ]


def test_no_file_speaks_of_the_place_where_it_was_written():
    places = re.compile(rb"/work" rb"/|(?<!\w)\.lib" rb"rary\b")
    neighbour = b"../shared" + b"/data"
    said = {path: path.read_bytes() for path in house_files()}
    assert not named([path for path, content in said.items() if places.search(content)])
    may = {HOUSE / "Makefile", HOUSE / ".ci/run"}
    assert not named([path for path, content in said.items() if neighbour in content and path not in may])


@pytest.mark.parametrize("module", ["gemwright", "gemwright.run", "gemwright.serve.server"])
def test_a_warning_from_our_own_modules_is_an_error(module: str):
    with pytest.raises(UserWarning, match="unheard"):
        warnings.warn_explicit("unheard", UserWarning, "somewhere.py", 1, module=module)


def test_a_warning_from_elsewhere_is_none():
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit("heard", UserWarning, "somewhere.py", 1, module="torch.jit")
    assert [str(warning.message) for warning in caught] == ["heard"]


FRESH_MACHINE = """
import importlib, pkgutil, sys
from importlib import metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

brought, todo = set(), [Requirement(wanted) for wanted in sys.argv[1:]]
while todo:
    wanted = todo.pop()
    name = canonicalize_name(wanted.name)
    if name not in brought and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        brought.add(name)
        todo += map(Requirement, metadata.requires(name) or ())
spare = {
    module for module, owners in metadata.packages_distributions().items()
    if not brought & {canonicalize_name(owner) for owner in owners} and module != "gemwright"
}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in spare:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import gemwright
for module in pkgutil.walk_packages(gemwright.__path__, "gemwright."):
    importlib.import_module(module.name)
"""


def test_the_core_imports_nothing_that_its_dependencies_do_not_bring():
    """datatrove imports what it does not ask for: `make demo` failed where no extra had brought it."""
    wanted = PYPROJECT["project"]["dependencies"]
    done = subprocess.run(
        [sys.executable, "-c", FRESH_MACHINE, *wanted], capture_output=True, text=True, cwd=HOUSE, check=False
    )
    assert done.returncode == 0, done.stderr
