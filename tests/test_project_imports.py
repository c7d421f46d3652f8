"""Do the packages import each other one way only, declare what they import, and do nothing on import?"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ghostmask

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "ghostmask": {"launcher", "masks", "engine"},
    "engine": {"engine"},
    "models": {"models", "engine"},
    "masks": {"masks", "engine"},
    "data_pipelines": {"data_pipelines", "engine"},
    "benchmarks": {"benchmarks", "masks", "models", "data_pipelines", "engine"},
    "launcher": {"launcher", "benchmarks", "masks", "models", "data_pipelines", "engine", "configs"},
    "configs": set[str](),
}
"""Ours that each package may import: launcher -> benchmarks -> masks | models | data_pipelines -> engine. ghostmask:
the files above them all, which offer the library and start the command."""
EVERYBODY = {"__version__"}
"""Names of ghostmask itself, which stands above the packages, that each may import; the library's are for others."""
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]
TESTS = sorted((ROOT / "tests").glob("*.py"))

HEAVY = {"torch", "torchvision", "deepspeed", "ffcv", "numba", "cv2", "tensorboard"}
LIGHT_FILES = ("config.py", "registry.py", "errors.py", "position.py")
"""Their importing must stay cheap: wrong input is answered before torch is loaded."""

DEFINING_CALLS = re.compile(
    r"re\.compile|logging\.getLogger|threading\.Lock|TypeVar|Path|frozenset|set|set\[\w+\]|tuple|list|dict|range|len|float|bool"
    r"|tl\.constexpr|binding\.\S+|intrinsic|np\.(u?int\d+|float\d+|empty|dtype)|torch\.finfo|math\.\w+|types\.\w+|numba\.njit(\(.*\))?|[\w.]*\.resolve|[A-Z]\w*"
)
"""Calls that may stand in a module's constants: they compute a value and touch nothing else."""
OPERATOR_CALLS = re.compile(
    r"\w+\.register_(autograd|fake|kernel|vmap)|torch\.library\.\w+|_\w+\.add_(constructor|implicit_resolver)"
)
"""Calls that complete a definition above them, as torch and PyYAML want it for operators and loaders."""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The dotted name of every module that the nodes import; for `from ghostmask import x`, ghostmask.x."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"ghostmask.{a.name}" for a in node.names) if node.module == "ghostmask" else [str(node.module)]


def libraries(nodes: Iterator[ast.AST]) -> set[str]:
    """The top-level name of every module that the nodes import."""
    return {name.split(".")[0] for name in imported(nodes)}


def run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module that run when it is imported, those inside `if` and `try` included."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            continue
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from run_on_import(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from run_on_import(handler.body)
        else:
            yield statement


def calls_outside_functions(statement: ast.stmt) -> Iterator[ast.Call]:
    """Calls that happen when a top-level statement runs: bodies of functions and lambdas do not."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
        return
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Call):
            yield node
        waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_one_way_from_launcher_to_engine(path: Path) -> None:
    ours = {f"{name}.".split(".")[1] for name in imported(ast.walk(parsed(path))) if name.split(".")[0] == "ghostmask"}
    forbidden = ours - MAY_IMPORT[package_of(path)] - EVERYBODY
    assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)} of ghostmask"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_under_a_short_name(path: Path) -> None:
    short = libraries(ast.walk(parsed(path))) & (set(MAY_IMPORT) - {"ghostmask"})
    assert not short, f"{path.relative_to(ROOT)} imports {sorted(short)}: write ghostmask.{min(short)}"


@pytest.mark.parametrize("package", ["benchmarks", "data_pipelines", "masks", "models"])
def test_a_registry_names_only_things_that_exist_in_its_own_package(package: str) -> None:
    registry = parsed(ROOT / package / "registry.py")
    targets = [
        node.value
        for node in ast.walk(registry)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+:\w+", node.value)
    ]
    assert targets, "the registry is empty, or no longer a literal dict"
    for target in targets:
        assert target.startswith(f"ghostmask.{package}.")
        assert is_defined(target), f"{target}: there is no such module, or no such name in it"


def test_what_the_library_offers_exists_and_hides_no_package() -> None:
    """Without importing it: most of it needs torch."""
    assert not set(ghostmask._LIBRARY) & set(MAY_IMPORT)
    missing = [target for target in ghostmask._LIBRARY.values() if not is_defined(target)]
    assert not missing


def is_defined(target: str) -> bool:
    """True where "ghostmask.module:name" names a class, a function or a constant in the file of that module."""
    module, _, name = target.partition(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.is_file():
        return False
    for node in parsed(path).body:
        defined = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        if name in {getattr(item, "id", getattr(item, "name", None)) for item in defined}:
            return True
    return False


@pytest.mark.parametrize("path", [p for p in FILES if p.name in LIGHT_FILES], ids=lambda p: "/".join(p.parts[-2:]))
def test_settings_and_registries_load_without_heavy_libraries(path: Path) -> None:
    assert not libraries(run_on_import(parsed(path).body)) & HEAVY


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_importing_a_module_does_nothing(path: Path) -> None:
    for statement in run_on_import(parsed(path).body):
        where = f"{path.relative_to(ROOT)}:{statement.lineno}"
        assert not isinstance(statement, ast.For | ast.While | ast.Assert | ast.Delete | ast.AugAssign), where
        allowed = OPERATOR_CALLS if isinstance(statement, ast.Expr) else DEFINING_CALLS
        for call in calls_outside_functions(statement):
            name = ast.unparse(call.func)
            assert allowed.fullmatch(name), f"{where} calls {name}() on import"


def test_every_library_that_is_imported_is_declared() -> None:
    """What happens to be installed because a dependency needs it may be gone with that dependency's next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [
        text for extra in ("digits", "imagenet", "export", "report") for text in project["optional-dependencies"][extra]
    ]
    declared = {normal(re.split(r"[^\w.-]", text)[0]) for text in requirements}
    declared.add("triton")  # part of torch where there is a GPU to use it; nothing imports it elsewhere
    providers = importlib.metadata.packages_distributions()
    for path in FILES:
        for name in libraries(ast.walk(parsed(path))) - {"ghostmask"} - set(sys.stdlib_module_names):
            sources = {normal(source) for source in providers.get(name, [])}
            assert sources & declared, (
                f"{path.relative_to(ROOT)} imports {name} ({sorted(sources)}), not in pyproject.toml"
            )


def normal(name: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


FORKS = re.compile(r"os\.fork\(|get_context\((\"fork\")?\)|\b(mp|multiprocessing)\.(Process|Pool|Queue)\(")


def test_only_the_writer_forks_which_is_a_process_without_threads() -> None:
    """A fork of a process with threads of torch, numba or gloo finds their locks held: it waits for ever or crashes."""
    found = [path.relative_to(ROOT).as_posix() for path in FILES if FORKS.search(path.read_text())]
    assert found == ["data_pipelines/writing/writer.py"]
