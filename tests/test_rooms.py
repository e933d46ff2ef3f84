"""The rooms of the house: every import leads to the same room or to one below."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the ground up. A file that stands alone in torchtitan/ is a room of its own.
ROOMS = (
    *("tools", "config", "audio", "distributed", "datasets", "models", "components", "checkpoint", "generation"),
    *("eval", "demo", "rules", "config_manager", "tokenization", "codec_training", "estimate", "train"),
    *("inference", "commands", "scripts"),
)
# Imports that lead up, each with its reason.
UPWARD: dict[tuple[str, str], str] = {}


def room_of(module: str) -> str:
    """The room of a module; those of eval/ are commands, as torchtitan/eval is what they call."""
    parts = module.split(".")
    if parts[0] == "torchtitan":
        return parts[1] if len(parts) > 1 else "tools"
    return "commands" if parts[0] == "eval" else parts[0]


@cache
def imports() -> dict[str, set[str]]:
    """The modules of this project that each module imports, wherever in the file, but for type checkers alone."""
    files = [ROOT / "inference.py"]
    for folder in ("torchtitan", "scripts", "eval"):
        files += sorted((ROOT / folder).rglob("*.py"))
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    found: dict[str, set[str]] = {}
    for file, name in names.items():
        tree = ast.parse(file.read_text())
        for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        skipped = {inner for node in for_types for inner in ast.walk(node)}
        asked = set()
        for node in ast.walk(tree):
            if node in skipped:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                asked |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
        found[name] = (asked & set(names.values())) - {name, "torchtitan"}
    return found


def test_every_room_is_in_the_list():
    assert {room_of(module) for module in imports() if module != "torchtitan"} == set(ROOMS)


def test_imports_lead_down():
    upward = {
        (module, other)
        for module, others in imports().items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    }
    assert upward == set(UPWARD)
    assert len(UPWARD) <= 4


def test_no_two_files_import_each_other():
    graph = imports()

    def reach(module: str, seen: frozenset[str] = frozenset()) -> None:
        if module in done:
            return
        for other in graph[module]:
            assert other not in seen | {module}, f"a circle: {module} imports {other}"
            reach(other, seen | {module})
        done.add(module)

    done: set[str] = set()
    for module in graph:
        reach(module)


def test_no_file_is_too_long_to_be_read():
    """But for the manual, which is read from top to bottom as one."""
    manual = ROOT / "torchtitan" / "config" / "job_config.py"
    files = [
        file for folder in ("torchtitan", "scripts", "eval", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    ]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files if file != manual}
    assert {name: lines for name, lines in lengths.items() if lines > 800} == {}


def test_no_function_has_too_many_parameters():
    """More than ten say that some of them are one thing."""
    found = set()
    for folder in ("torchtitan", "scripts", "eval", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef):
                    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                    if len([name for name in names if name not in ("self", "cls")]) > 10:
                        found.add(f"{file.relative_to(ROOT)}:{node.name}")
    assert found == set()
