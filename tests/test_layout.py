"""The size and shape of the house: packages, files, functions, and how many carry everything."""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kleash"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MOST_ENTRIES = 19
"""17; `integrations`, what other libraries' trainers need, which nothing else may import; and
`mesh`, the processes of a run, which storage, models and training alike are given."""
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 60
MOST_WITH_A_CONFIG = 25
MOST_WITH_ALL_COMPONENTS = 10
MOST_PARAMETERS = 7


@dataclass(frozen=True)
class Function:
    """One function or method, nested ones too."""

    path: Path
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    public: bool
    """Neither it nor its class has a private name, and it is not nested in a function."""

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.node.lineno} {self.name}"

    @property
    def package(self) -> str:
        return self.path.relative_to(PACKAGE).parts[0]

    @property
    def lines(self) -> int:
        """Of its signature and code; its docstring is documentation."""
        first = self.node.body[0]
        documented = ast.get_docstring(self.node) is not None
        docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
        return (self.node.end_lineno or 0) - self.node.lineno + 1 - docstring

    @property
    def parameters(self) -> list[ast.arg]:
        """All of them, without `self` and `cls`."""
        given = self.node.args
        single = [arg for arg in (given.vararg, given.kwarg) if arg is not None]
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *single]
        return [arg for arg in every if arg.arg not in ("self", "cls")]

    @property
    def signature_is_given(self) -> bool:
        """A kernel takes pointers and sizes alone, and `autograd.Function` tensors one by one."""
        kernel = any(ast.unparse(each) == "triton.jit" for each in self.node.decorator_list)
        return kernel or [arg.arg for arg in self.node.args.args[:1]] == ["ctx"]

    @property
    def required(self) -> int:
        """Parameters without a default."""
        given = self.node.args
        defaults = len(given.defaults) + sum(value is not None for value in given.kw_defaults)
        extra = sum(arg is not None for arg in (given.vararg, given.kwarg))
        return len(self.parameters) - defaults - extra


def functions(path: Path) -> Iterator[Function]:
    """Every function of a file."""

    def inside(node: ast.AST, *, public: bool) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                # What `__init__` and the like take is what users of a public class give.
                private = child.name.startswith("_") and not child.name.endswith("__")
                yield Function(path, child.name, child, public and not private)
                yield from inside(child, public=False)
            elif isinstance(child, ast.ClassDef):
                yield from inside(child, public=public and not child.name.startswith("_"))
            else:
                yield from inside(child, public=public)

    yield from inside(ast.parse(path.read_text(encoding="utf-8")), public=True)


def names_in(annotation: ast.expr | None) -> set[str]:
    """Identifiers of an annotation, those inside quotes too."""
    if annotation is None:
        return set()
    names: set[str] = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                quoted = ast.parse(node.value, mode="eval").body
            except SyntaxError:  # the shape of a tensor
                continue
            names |= names_in(quoted)
    return names


def takes(function: Function, *, annotated: str, named: str | None = None) -> bool:
    """Whether a parameter has this name or this class in its annotation."""
    return any(
        arg.arg == named or annotated in names_in(arg.annotation) for arg in function.parameters
    )


def counted(found: Iterable[Function]) -> str:
    """How many, per package, and where."""
    every = list(found)
    per_package = Counter(function.package for function in every)
    each = "\n    ".join(function.where for function in every)
    return f"{len(every)} {dict(per_package.most_common())}\n    {each}"


EVERY = [function for path in SOURCES for function in functions(path)]


def test_the_package_has_few_entries() -> None:
    entries = sorted(
        path.name
        for path in PACKAGE.iterdir()
        if not path.name.startswith("__") and path.name != "py.typed"
    )
    print(len(entries), *entries)
    assert len(entries) <= MOST_ENTRIES


def test_every_folder_of_the_package_has_its_folder_of_tests() -> None:
    folders = {path.parent.relative_to(PACKAGE) for path in SOURCES if path.name != "__init__.py"}
    without = [
        str(folder)
        for folder in sorted(folders)
        if not list((ROOT / "tests" / folder).glob("test_*.py"))
    ]
    assert without == []


def test_every_test_module_stands_where_the_tree_has_a_folder() -> None:
    elsewhere = {"support", "examples"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS}
    mirrored = [folder for folder in folders if folder.parts and folder.parts[0] not in elsewhere]
    assert [str(folder) for folder in mirrored if not (PACKAGE / folder).is_dir()] == []


def test_no_file_is_long() -> None:
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in [*SOURCES, *TESTS]}
    long = {
        str(path.relative_to(ROOT)): size
        for path, size in sizes.items()
        if size > MOST_LINES_OF_A_FILE
    }
    print(f"{len(long)} files over {MOST_LINES_OF_A_FILE} lines:", long)
    assert long == {}


def test_no_function_is_long() -> None:
    of_tests = [function for path in TESTS for function in functions(path)]
    long = [
        f"{function.where}: {function.lines} lines"
        for function in [*EVERY, *of_tests]
        if function.lines > MOST_LINES_OF_A_FUNCTION
    ]
    assert long == []


def test_class_names_are_unique_across_the_package() -> None:
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


@pytest.mark.parametrize(
    ("annotated", "named", "most"),
    [
        ("Config", "config", MOST_WITH_A_CONFIG),
        ("Components", None, MOST_WITH_ALL_COMPONENTS),
    ],
)
def test_few_functions_take_everything(annotated: str, named: str | None, most: int) -> None:
    # In `integrations` the name is that of other libraries' own settings.
    ours = [f for f in EVERY if f.package != "integrations"]
    found = [f for f in ours if takes(f, annotated=annotated, named=named)]
    print(f"functions that take {annotated}:", counted(found))
    assert len(found) <= most, counted(found)


def test_no_function_has_many_parameters_but_public_ones_with_defaults() -> None:
    found = [
        function
        for function in EVERY
        if len(function.parameters) > MOST_PARAMETERS
        and not function.signature_is_given
        and not (function.public and function.required <= MOST_PARAMETERS)
    ]
    assert found == [], counted(found)


def test_the_counts_see_what_they_count() -> None:
    source = """
def plain(a, b): ...
def quoted(x: "Config | None"): ...
def shaped(x: Float[Tensor, "batch token"]): ...
def wide(a, b, c, d, e, f, g, h): ...
def defaults(a, *, b=1, c=1, d=1, e=1, f=1, g=1, h=1): ...
class Holder:
    def method(self, inside: training.Components): ...
    def _private(self, a, b=1, c=1, d=1, e=1, f=1, g=1, h=1): ...
def documented(a):
    '''A docstring
    of two lines.'''
    return a
"""
    node = ast.parse(source)
    path = PACKAGE / "cli" / "example.py"
    found = {
        child.name: Function(path, child.name, child, not child.name.startswith("_"))
        for child in ast.walk(node)
        if isinstance(child, ast.FunctionDef)
    }
    config = [n for n, f in found.items() if takes(f, annotated="Config", named="config")]
    assert config == ["quoted"]
    assert [n for n, f in found.items() if takes(f, annotated="Components")] == ["method"]
    sizes = {name: (len(f.parameters), f.required) for name, f in found.items()}
    assert sizes["wide"] == (8, 8)
    assert sizes["defaults"] == (8, 1)
    assert sizes["_private"] == (8, 1)
    assert sizes["method"] == (1, 1)
    assert found["documented"].lines == 2
