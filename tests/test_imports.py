"""Imports point one way: read from the source files, so also those inside functions and for type checkers count."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

# A module imports modules of its own layer and of those before it.
LAYERS = (
    (
        "signals",
        "errors",
        "files",
        "hashing",
        "bitstream",
        "precision",
        "distributed",
        "ranges",
        "wavelets",
        "channels",
    ),
    ("models", "losses", "autoencoders", "normalization", "foundation", "text_encoder"),
    ("data", "pipelines"),
    ("training",),
    ("cli", "cli_options", "commands", "__main__"),
)
COMMAND_LINE = LAYERS[-1]
OUTSIDE = ("adapters", "eval")  # installed inside the package, but no part of the library


def modules() -> dict[str, Path]:
    """The library's modules by name."""
    found = {}
    for path in (ROOT / "favae").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if part_of(name) not in OUTSIDE:
            found[name] = path
    return found


def part_of(module: str) -> str:
    """The second word of a module's name, such as "data"; of the package itself, nothing."""
    return module.partition(".")[2].partition(".")[0]


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) for `from module import name`, and (module, "") for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from ((node.module, alias.name) for alias in node.names)


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
# What packages pass on lazily: (package, name) -> the module that has it. Type checkers read it from their __init__.py.
PASSED_ON = {
    (package, name): module
    for package, path in MODULES.items()
    if path.name == "__init__.py"
    for module, name in imported_names(TREES[package])
    if name
}


def imports(module: str, tree: ast.AST) -> set[str]:
    """The modules of favae that the code needs."""
    if MODULES[module].name == "__init__.py":
        tree = ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])  # if TYPE_CHECKING
    found = set()
    for origin, name in imported_names(tree):
        while (origin, name) in PASSED_ON:
            origin = PASSED_ON[origin, name]
        found.add(f"{origin}.{name}" if f"{origin}.{name}" in MODULES else origin)
    return {name for name in found if name.partition(".")[0] == "favae"} - {module}


GRAPH = {module: imports(module, tree) for module, tree in TREES.items()}


def test_there_are_no_circles():
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names them


def test_imports_point_one_way():
    layer = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    wrong = []
    for module, needed in GRAPH.items():
        if part_of(module):
            assert part_of(module) in layer, f"{module} belongs to none of the layers"
            wrong += [(module, other) for other in needed if layer.get(part_of(other), 0) > layer[part_of(module)]]
        if part_of(module) == "models":
            wrong += [(module, other) for other in needed if part_of(other) == "losses"]
    assert not wrong


def test_the_library_does_not_need_what_stands_beside_it():
    beside = {"adapters", "eval", "experiments", "benchmarks", "train_tokenizer", "train_generator"}
    for module, tree in TREES.items():
        if part_of(module) in COMMAND_LINE:  # knows the commands there are, and imports them when they run
            tree = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        for origin, name in imported_names(tree):
            words = f"{origin}.{name}".split(".")
            assert not beside & {words[0], words[1] if words[0] == "favae" else ""}, f"{module} imports {origin}"
