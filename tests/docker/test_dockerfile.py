"""docker/Dockerfile, as far as it can be checked without docker: pins, sources, shell, what it leaves out."""

import ast
import re
import shlex
import subprocess

import pytest
from packaging.requirements import Requirement

from tests.support.places import ROOT

TEXT = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = {"FROM", "ARG", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}


def instructions(text=TEXT):
    """(instruction, rest) with comments dropped and continuation lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def rest_of(name):
    return [rest for word, rest in instructions() if word == name]


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def commands(shell):
    """Words of each simple command of a RUN."""
    words = list(shlex.shlex(shell, posix=True, punctuation_chars=True))
    command = []
    for word in words:
        if set(word) <= set("&|;()"):
            yield command
            command = []
        else:
            command.append(word)
    yield command


def pip_installs(texts):
    """Arguments of each `pip install`; variables may stand before it (`A=1 pip install ...`)."""
    for text in texts:
        for command in commands(text):
            if "pip" in command:
                at = command.index("pip")
                assert command[at + 1] == "install", command
                yield command[at + 2 :]


def pin_problems(arguments):
    """What `pip install ARGUMENTS` would take in a version that nobody chose."""
    found = []
    words = iter(arguments)
    has_constraints = False
    for word in words:
        if word == "-c":
            has_constraints = next(words) == "constraints.txt" or has_constraints
        elif word.startswith("-"):
            if word not in ("-e", "--no-deps", "--no-build-isolation"):
                found.append(f"option {word}")
        elif "==" in word:
            name, version = word.split("==")
            if pins().get(name, version) != version:
                found.append(f"{word}, but {pins()[name]} in constraints.txt")
        elif word.startswith("."):
            if not has_constraints and "--no-deps" not in arguments:
                found.append(f"{word} without constraints")
        elif not has_constraints or word not in pins():
            found.append(f"{word} without a version")
    return found


def test_it_is_made_of_known_instructions():
    assert {word for word, _ in instructions()} == INSTRUCTIONS


def test_the_base_image_is_pinned():
    (image,) = rest_of("FROM")
    values = dict(arg.split("=", 1) for arg in rest_of("ARG") if "=" in arg)
    assert re.fullmatch(r"\d+\.\d+\.\d+", values["CUDA_VERSION"])
    assert re.fullmatch(r"nvidia/cuda:\$\{CUDA_VERSION\}-devel-ubuntu\d\d\.04", image)
    # The comment says for which torch the CUDA version was looked up: a new torch asks for a new look.
    assert f"(torch {pins()['torch']}: {values['CUDA_VERSION']})" in TEXT


def test_every_pip_install_is_pinned():
    installs = list(pip_installs(rest_of("RUN")))
    assert len(installs) == 3
    assert [problem for arguments in installs for problem in pin_problems(arguments)] == []
    assert "--index-url" not in TEXT and "PIP_INDEX" not in TEXT


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("pip install torch", "torch without a version"),
        ("pip install -c constraints.txt flash-attn", "flash-attn without a version"),
        ("A=1 pip install torch==2.0.0", "torch==2.0.0, but"),
        ("true && pip install .", ". without constraints"),
        ("pip install --pre -c constraints.txt torch", "option --pre"),
        ("pip install -c other.txt torch", "torch without a version"),
    ],
)
def test_an_unpinned_install_is_seen(command, problem):
    ((found,),) = [pin_problems(arguments) for arguments in pip_installs([command])]
    assert found.startswith(problem)


def test_apex_is_built_from_a_commit_with_its_extensions():
    (commit,) = [arg.split("=")[1] for arg in rest_of("ARG") if arg.startswith("APEX_COMMIT=")]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (run,) = [rest for rest in rest_of("RUN") if "apex" in rest]
    for part in ("github.com/NVIDIA/apex", "APEX_CPP_EXT=1", "APEX_CUDA_EXT=1", '"$APEX_COMMIT"'):
        assert part in run
    assert run.startswith('if [ "$APEX" = 1 ]; then')
    # What the code looks for, so that the build fails rather than the run.
    assert "amp_C" in run and '"amp_C"' in (ROOT / "megallama/host/built_kernels.py").read_text("utf-8")
    assert not any(word == "apex" for arguments in pip_installs(rest_of("RUN")) for word in arguments)


def test_copied_files_exist_and_are_enough():
    copied = [word for rest in rest_of("COPY") for word in rest.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied), copied
    assert {"megallama", "conf", "launch", "slurm", "constraints.txt", "setup.py", "README.md"} <= set(copied)
    lines = [f"{word} {rest}" for word, rest in instructions()]
    first_use = next(
        i for i, line in enumerate(lines) if "constraints.txt" in line and line.startswith("RUN")
    )
    assert lines.index("COPY constraints.txt ./") < first_use


@pytest.mark.parametrize("number", range(len(rest_of("RUN"))))
def test_shell_parses(number):
    script = "\n".join(rest_of("RUN")[number].split("\\\n"))
    done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def requirements():
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    return ast.literal_eval(values["install_requires"]) + ast.literal_eval(values["extras_require"])["dev"]


@pytest.mark.parametrize("text", requirements())
def test_what_the_package_needs_is_pinned_within_its_range(text):
    requirement = Requirement(text)
    version = {name.lower().replace("_", "-"): v for name, v in pins().items()}[requirement.name]
    assert requirement.specifier.contains(version)
