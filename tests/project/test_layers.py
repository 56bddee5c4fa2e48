"""The layers of docs/architecture.md hold: imports go down, a library has one owner, the environment one reader."""

import ast
import re
import subprocess
import sys

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "megallama"
READERS = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv", "expandvars"}


def table():
    """{part: (layer, libraries)} as docs/architecture.md says; a part is a package or a module of megallama."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:\.py|/)` \| (.*) \|$", text, flags=re.M)
    return {part: (int(layer), set(libs.split(", ")) - {"none"}) for layer, part, libs in rows}


TABLE = table()


def imports(tree):
    """Dotted names of everything imported anywhere: at the top, in functions, under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def owner_problem(part, name):
    """Why `part` may not import the foreign `name`; the most specific library of the table decides."""
    named = {library for _, libraries in TABLE.values() for library in libraries}
    fitting = [library for library in named if name == library or name.startswith(f"{library}.")]
    if not fitting:
        return f"{name} belongs to nobody"
    library = max(fitting, key=len)
    if library not in TABLE[part][1]:
        return f"{name} does not belong to {part}"
    return None


def problems(path, source):
    """What is wrong in `source`, the text of the file `path` (relative to the package)."""
    part = path.split("/")[0].removesuffix(".py")
    tree = ast.parse(source)
    found = []
    for name, line in imports(tree):
        words = name.split(".")
        problem = None
        if words[0] == "":
            problem = "relative import"
        elif words[0] == "megallama":
            other = words[1] if len(words) > 1 else ""
            if other not in TABLE:
                problem = f"{name} stands in no layer"
            elif other != part and TABLE[other][0] >= TABLE[part][0]:
                problem = f"{part} (layer {TABLE[part][0]}) imports {name} (layer {TABLE[other][0]})"
        elif words[0] not in sys.stdlib_module_names:
            problem = owner_problem(part, name)
        if problem:
            found.append(f"{path}:{line}: {problem}")
    for node in ast.walk(tree):
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)
        if name in READERS and part != "host":
            found.append(f"{path}:{node.lineno}: reads the environment ({name})")
        if name in ("import_module", "__import__") and part not in ("host", "compat", "__init__"):
            found.append(f"{path}:{node.lineno}: hides an import from this test ({name})")
    return found


def test_the_package_keeps_its_layers():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += problems(str(path.relative_to(PACKAGE)), path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_the_table_has_every_part_and_no_other():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert set(TABLE) == packages | modules


def test_every_library_of_the_table_is_used_and_has_one_owner():
    """torch is every part's that computes, NumPy every part's that handles tokens; the others stand once."""
    for library in {library for _, libraries in TABLE.values() for library in libraries}:
        owners = [part for part, (_, libraries) in TABLE.items() if library in libraries]
        assert library in ("torch", "numpy") or len(owners) == 1, (library, owners)
        for part in owners:
            files = [*(PACKAGE / part).rglob("*.py"), *PACKAGE.glob(f"{part}.py")]
            used = [
                name for file in files for name, _ in imports(ast.parse(file.read_text(encoding="utf-8")))
            ]
            assert any(name.startswith(f"{library}.") or name == library for name in used), (library, part)


def test_decisions_of_the_design():
    assert TABLE["grid"][1] == set() and "torch" not in TABLE["config"][1]
    assert TABLE["trainer"][1] == {"torch"}
    assert [part for part, (_, libs) in TABLE.items() if "deepspeed" in libs] == ["compat"]
    importers = [
        path
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "deepspeed" for name, _ in imports(ast.parse(path.read_text("utf-8"))))
    ]
    assert importers == [PACKAGE / "compat" / "deepspeed.py"]
    for path in PACKAGE.rglob("__init__.py"):
        assert (path.stat().st_size == 0) == (path.parent != PACKAGE), path


def test_planning_and_checking_load_no_torch():
    code = "import sys, megallama.preflight, megallama.config.load, megallama.model.counts, megallama.cli;"
    code += "print(sorted({'torch', 'megatron', 'deepspeed'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "source", "word"),
    [
        ("grid.py", "import megallama.host.errors", "grid (layer 0) imports"),
        ("model/build.py", "from megallama.stream.loader import DataLoader", "layer 3"),
        ("model/build.py", "from megallama import engine", "layer 4"),
        ("config/load.py", "def f():\n    import torch", "torch does not belong to config"),
        ("config/load.py", "if TYPE_CHECKING:\n    from torch import Tensor", "torch.Tensor does not belong"),
        ("model/build.py", "from megatron.core import parallel_state", "does not belong to model"),
        ("engine/zero.py", "import deepspeed.comm", "does not belong to engine"),
        ("config/load.py", "from hydra._internal.utils import run_and_report", "does not belong to config"),
        ("metrics/meter.py", "import torch.distributed.checkpoint", "does not belong to metrics"),
        ("model/build.py", "import datasets", "belongs to nobody"),
        ("generate.py", "import transformers", "does not belong to generate"),
        ("model/build.py", "from . import layout", "relative"),
        ("train.py", "from megallama.tools import x", "in no layer"),
        ("trainer/loop.py", "import os\nos.environ['A']", "reads the environment"),
        ("trainer/loop.py", "from os import getenv", "reads the environment"),
        ("trainer/loop.py", "importlib.import_module('deepspeed')", "hides an import"),
    ],
)
def test_a_violation_is_seen(path, source, word):
    (found,) = problems(path, source)
    assert word in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "engine/zero.py",
            "from megallama.compat import deepspeed\nfrom megallama.engine.step import StepResult",
        ),
        ("checkpoint/distributed/storage.py", "from torch.distributed.checkpoint.metadata import Metadata"),
        ("topology/connect.py", "from megatron.core import parallel_state"),
        ("host/launch.py", "import os\nos.environ['A']"),
    ],
)
def test_what_is_allowed_is_let_pass(path, source):
    assert problems(path, source) == []
