"""What the documents say exists: every file in the architecture, every linked page, every command and its words."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megallama.cli import _parser
from megallama.config.load import load_config
from megallama.config.words.command_line import CommandLine
from megallama.huggingface.names import canonical_tensors
from tests.project.file_table import PACKAGE, rows, written_rows
from tests.support.places import ROOT

TOP_LEVEL = {
    *("setup.py", "megallama", "conf", "launch", "tests", "docker", "slurm", "docs", "benchmarks", ".ci"),
    *("README.md", "Makefile", "constraints.txt", "LICENSE", "pyproject.toml", ".gitignore"),
}
MOST_FILES = 13
"""Files of one folder of megallama/; the next one wants a room of its own."""
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_no_data_is_committed():
    """`data/` is where the experiments look for the user's own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout
    names = {name.partition("/")[0] for name in listed.split("\0") if name}
    assert names <= TOP_LEVEL and (names or not (ROOT / ".git").exists())


def test_the_checkpoint_format_names_every_tensor():
    text = (ROOT / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")
    specified = set(re.findall(r"^\| `([\w.]+)` \|", text, flags=re.M))
    words = ["+exp=llama2_7b", "model.qkv_bias=true", "model.qk_norm=true"]
    model = load_config(words).model
    tensors = {re.sub(r"layers\.\d+\.", "layers.N.", name) for name in canonical_tensors(model)}
    assert len(tensors) == 13 and tensors <= specified


def test_the_file_table_is_what_the_files_say():
    assert written_rows() == rows(), "run make docs"


def test_every_room_has_a_line_and_at_most_a_dozen_files_or_so():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {
        path.parent.name: len(list(path.parent.glob("*.py"))) - 1 for path in PACKAGE.glob("*/__init__.py")
    }
    assert set(re.findall(r"^\| `(\w+)/` \| \D", text, flags=re.M)) == set(rooms)
    every = {
        path.parent: len(list(path.parent.glob("*.py"))) - 1 for path in PACKAGE.glob("*/**/__init__.py")
    }
    assert all(number <= MOST_FILES for number in every.values()), every


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def links(document):
    """What a document links to, from the repository's root, once for each time."""
    targets = re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8"))
    return [
        target if "://" in target else os.path.relpath((document.parent / target).resolve(), ROOT)
        for target in targets
    ]


def test_the_chinese_readme_links_to_what_the_english_one_does():
    english, chinese = ROOT / "README.md", ROOT / "docs" / "zh" / "README.md"
    own = {str(path.relative_to(ROOT)) for path in (english, chinese)}
    assert set(links(english)) - own == set(links(chinese)) - own

    def more(document, title):
        """The links of the last section."""
        text = document.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2]
        return [Path(target).name for target in re.findall(r"\]\(([^)]+)\)", text)]

    assert more(english, "More") == more(chinese, "更多") and len(more(english, "More")) > 8


def commands(document):
    """Shell commands in the fenced blocks of a document, continuation lines joined."""
    for block in re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_stand_in_blocks_that_are_read(document):
    text = document.read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(.*?)\n(.*?)^```", text, flags=re.S | re.M):
        if kind != "sh":
            assert kind in ("", "python", "yaml", "json"), (
                f"{document.name}: ```{kind} is never checked, use ```sh"
            )
            assert not re.search(r"^(\$ )?(megallama|torchrun|python|sbatch) ", block, flags=re.M), block


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_parse(document):
    for words in commands(document):
        if words[0] == "megallama":
            options = _parser().parse_args(words[1:])
            if "overrides" in options:
                # Without --config-dir: the folder is made by an earlier command of the page.
                CommandLine(options.overrides, options.multirun).load_runs()
        script = next((word for word in words if word in ("launch/train.py", "slurm/pretrain_7b.sh")), None)
        if script is not None:
            overrides = words[words.index(script) + 1 :]
            if script.startswith("slurm") and not any("exp=" in word for word in overrides):
                overrides = ["+exp=llama2_7b", *overrides]
            load_config([word for word in overrides if not word.startswith("--")])


@pytest.mark.parametrize(
    "name", ["README.md", "docs/quickstart.md", "docs/cluster.md", "docs/parallelism.md"]
)
def test_commands_are_found(name):
    assert list(commands(ROOT / name))


def test_the_quickstart_has_commands_of_each_kind():
    found = {words[1] for words in commands(ROOT / "docs" / "quickstart.md") if words[0] == "megallama"}
    assert found >= {"tokenizer", "prepare", "train", "generate", "plot"}
