"""torch's private API, which may change with any version, is used in one file alone."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRIVATE_ROOM = ROOT / "torchtitan" / "tools" / "torch_private.py"
# Attributes with an underscore that other libraries document.
DOCUMENTED = {"_replace", "_asdict", "_exit", "_attn_implementation"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def trees() -> dict[Path, ast.Module]:
    folders = ("torchtitan", "scripts", "eval", "benchmarks")
    files = [ROOT / "inference.py", *(file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))]
    return {file: ast.parse(file.read_text()) for file in files}


def defined_names(tree: ast.Module) -> set[str]:
    """Names of functions, classes, variables and attributes that a file makes."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    names |= {node.attr for node in stored if isinstance(node, ast.Attribute)}
    return names | {node.id for node in stored if isinstance(node, ast.Name)}


def private_uses(tree: ast.Module, own: set[str]) -> set[str]:
    """Private modules and names that a file imports from elsewhere, and private attributes and arguments that are not
    among its own."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if not node.module.startswith("torchtitan"):
                found |= {name for name in names if any(map(is_private, name.split(".")))}
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own | DOCUMENTED:
            found.add(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
            found.add(f"{node.arg}=")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("torch."):
            found |= {node.value} if any(map(is_private, node.value.split("."))) else set()
    return found


def test_private_names_of_torch_stand_in_one_file():
    files = trees()
    own = set().union(*(defined_names(tree) for file, tree in files.items() if file != PRIVATE_ROOM))
    found = {file: private_uses(tree, own) for file, tree in files.items()}
    assert found.pop(PRIVATE_ROOM)
    assert {str(file.relative_to(ROOT)): uses for file, uses in found.items() if uses} == {}


def test_each_of_them_says_why():
    tree = trees()[PRIVATE_ROOM]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions
    for function in functions:
        assert "public" in (ast.get_docstring(function) or "").lower(), (
            f"{function.name}: why does no public API do it?"
        )


def test_a_private_use_is_found():
    source = """
import torch._dynamo
from torch.distributed.tensor._utils import compute
from torch.distributed.pipelining.schedules import _Action
from torchtitan.tools import _own
mesh._flatten()
torch.cuda.memory._dump_snapshot(path)
nn.Embedding(1, 1, _weight=weight)
preload(["torch._dynamo.backends"])
self._mine, other.__len__, pair._replace()
"""
    assert private_uses(ast.parse(source), {"_mine"}) == {
        *("torch._dynamo", "torch.distributed.tensor._utils.compute", "torch.cuda.memory._dump_snapshot", "_weight="),
        *("torch.distributed.pipelining.schedules._Action", "mesh._flatten", "torch._dynamo.backends"),
    }
