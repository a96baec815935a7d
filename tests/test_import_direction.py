"""Imports point one way (README, Architecture). Imports inside functions count; `if TYPE_CHECKING:` does not."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import, next to itself, contracts and the package root.
ALLOWED: dict[str, set[str]] = {
    "contracts": set(),
    "distributed": {"lean_attention"},
    "attention": {"distributed", "lean_attention"},
    "model": {"attention", "distributed", "lean_attention"},
    "grammars": set(),
    "worker": {"grammars", "model", "attention", "distributed", "lean_attention"},
    "engine": set(),
    "server": {"grammars"},
    "loadtest": {"bundled"},
    "planner": {"model"},
    "launch": {
        "grammars",
        "worker",
        "model",
        "attention",
        "distributed",
        "lean_attention",
        "server",
        "engine",
        "bundled",
    },
    "outputs": set(),
    "llm": {"grammars", "launch", "outputs", "server"},
    "generate": {"llm"},
    "bench": {"launch", "worker", "model", "attention", "distributed", "engine", "llm", "lean_attention"}
    | {"server", "bundled"},
    "bundled": {"launch", "server"},
    "__main__": {"launch", "llm", "generate", "bench", "bundled", "loadtest", "planner", "server"},
    "__init__": {"llm"},
    "lean_attention": set(),
}
TORCH_FREE = {"contracts", "engine", "grammars", "server", "loadtest", "planner"}
CONTRACTS_MAY_IMPORT = {"msgspec"}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "lean_attention"
    return parts[1].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of every module that a file imports at run time, wherever the import stands."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "leanserve" and len(parts) > 1:
            rooms.add(parts[1])
        elif parts[0] == "lean_attention":
            rooms.add("lean_attention")
    return rooms - {"__version__"}


SOURCES = sorted([*(ROOT / "leanserve").rglob("*.py"), *(ROOT / "kernels" / "lean_attention").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(path)
    allowed = ALLOWED[room] | {room}
    if room != "lean_attention":
        allowed |= {"contracts"}
    assert rooms_imported(path) <= allowed, f"{path.relative_to(ROOT)} reaches outside its room; see ALLOWED"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_free_rooms_import_no_torch(path: Path) -> None:
    if room_of(path) not in TORCH_FREE:
        return
    heavy = {name for name in imported_modules(path) if name.split(".")[0] in {"torch", "triton", "transformers"}}
    # transformers' chat-template utilities are torch-free; the model and tokenizer classes are not.
    assert heavy <= {n for n in heavy if n.startswith("transformers.utils")}


def test_contracts_import_the_standard_library_and_msgspec_only() -> None:
    import sys

    for path in (ROOT / "leanserve" / "contracts").rglob("*.py"):
        for name in imported_modules(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names | CONTRACTS_MAY_IMPORT | {"leanserve"}, f"{path}: {name}"


def test_the_rule_catches_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from leanserve.worker import runner\n")
    assert rooms_imported(wrong) == {"worker"}


def test_kernels_is_a_source_root_and_never_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
