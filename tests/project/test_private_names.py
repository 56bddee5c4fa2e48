"""What is private in a library is touched in compat/ alone, and nothing else replaces a library's functions.

What the source tells: imports of names with an underscore; attributes with an underscore that neither belong to `self`
nor are defined in the same file; and assignments to an attribute of an imported module.
"""

import ast
import sys

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "megallama"


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def foreign_modules(tree):
    """{name in the file: library} of what is imported from outside of the project and the standard library."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
        else:
            continue
        for name, library in names:
            root = library.split(".")[0]
            if root != "megallama" and root not in sys.stdlib_module_names:
                found[name] = library
    return found


def own_names(tree):
    """Names with an underscore that the file defines: functions, fields, and what it assigns to `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) in ("self", "cls")
        ):
            yield node.attr


def root_of(node):
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def problems(path, source):
    """What is wrong in `source`, the text of the file `path` (relative to the package)."""
    if path.startswith("compat/"):
        return []
    tree = ast.parse(source)
    foreign, own = foreign_modules(tree), set(own_names(tree))
    found = []
    for name, library in foreign.items():
        if any(is_private(word) for word in library.split(".")):
            found.append(f"{path}: imports {library} as {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        root = root_of(node.value)
        text = f"{path}:{node.lineno}: {ast.unparse(node)}"
        if is_private(node.attr) and ast.unparse(node.value) not in ("self", "cls"):
            if root in foreign or (node.attr not in own and root not in sys.stdlib_module_names):
                found.append(f"{text} is private")
        elif isinstance(node.ctx, ast.Store) and root in foreign:
            found.append(f"{text} is replaced")
        if ast.unparse(node) == "sys.modules":
            found.append(f"{text} reaches into modules")
    return found


def test_only_compat_touches_what_is_private_in_a_library():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += problems(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from hydra._internal.utils import f",
        "from torch.distributed import _tensor",
        "import torch\ntorch._dynamo.reset()",
        "import torch\naten = torch.ops.aten\naten._flash()",
        "def f(optimizer): return optimizer._grads",
        "class A:\n    def __init__(self, engine): self._engine = engine._prologue",
        "class A:\n    def f(self): self._engine._prologue = None",
        "import torch\ntorch.Tensor.float = None",
        "from deepspeed.runtime import bf16\nbf16.see_memory_usage = None",
        "import sys\nsys.modules['a'].b = None",
    ],
)
def test_a_private_name_is_seen(source):
    assert len(problems("engine/zero.py", source)) == 1
    assert problems("compat/torch.py", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(1)",
        "class A:\n    def _then(self): return self\ndef f(a): return a._then()",
        "class A:\n    def __init__(self): self._x = 1\n    def __eq__(self, other): return self._x == other._x",
        "import torch\ntorch.nn.functional.silu\ntorch.__version__",
        "def f(tensor): tensor.grad = None",
        "from megallama.compat import deepspeed\ndeepspeed.gathered(1)",
    ],
)
def test_what_is_allowed_is_let_pass(source):
    assert problems("engine/zero.py", source) == []
