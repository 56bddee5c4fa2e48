"""The file table of docs/architecture.md, from the first line of each file's docstring. `make docs` writes it."""

from __future__ import annotations

import ast
import re

from tests.support.places import ROOT

PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "megallama"
_TABLE = re.compile(
    r"(## Files of `megallama/`\n.*?\| file \| what \|\n\|---\|---\|\n)(.*?)(?=\n\n|\Z)", re.S
)


def rows() -> str:
    """A row a file: folders before the files beside them."""
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return "".join(
        f"| `{path}` | {_first_line((PACKAGE / path).read_text(encoding='utf-8'))} |\n"
        for path in sorted(files, key=lambda path: (len(path.parts) == 1, path.parts))
    )


def written_rows() -> str:
    """The rows as the page has them."""
    found = _TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None, f"{PAGE} has no file table"
    return found[2].strip() + "\n"


def _first_line(source: str) -> str:
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, "every file says in its docstring what it holds"
    return docstring.splitlines()[0].replace("|", "\\|")


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index("| file | what |\n|---|---|\n"), text.index("Beside it: `launch/`")
    PAGE.write_text(f"{text[:begin]}| file | what |\n|---|---|\n{rows()}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
