"""Every setting is read by code outside of the config package: an option that does nothing is a lie.

A field counts as read where its value is loaded from something whose type is known to be its section: an annotated
parameter or attribute, what was assigned from one, or an element of a list of sections. Names alone do not count:
many things have an attribute called `name` or `path`. A property of a section
is no setting; reading one counts for the fields that it is made of.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing

import pytest

from megallama.config import schema
from tests.support.places import ROOT

SECTIONS = {name: cls for name, cls in vars(schema).items() if dataclasses.is_dataclass(cls)}
TYPES = {cls: typing.get_type_hints(cls) for cls in SECTIONS.values()}
FIELDS = {
    f"{cls.__name__}.{field.name}"
    for cls in SECTIONS.values()
    for field in dataclasses.fields(cls)
    if TYPES[cls][field.name] not in TYPES
}

SHAPE_ONLY = {
    f"megallama/huggingface/{name}.py"
    for name in ("config", "export_model", "checkpoint_source", "in_memory", "model_card")
}
"""Files that only write a shape down, for people or for transformers."""

LIMITS = {"ModelConfig.max_seq_len"}
"""Fields whose whole effect is that a rule refuses a run beyond them, so the rules read them and nobody else."""


def annotated(node):
    """The section, or list of sections, that an annotation such as `RunConfig` or `Sequence[SourceConfig]` names."""
    if node is None:
        return None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in SECTIONS:
            section = SECTIONS[part.id]
            is_list = isinstance(node, ast.Subscript)
            return list[section] if is_list else section
    return None


class Reader(ast.NodeVisitor):
    """Collects `Section.field` for each field loaded in one file."""

    def __init__(self, returns):
        self.returns = returns  # {function or method: section}
        self.scopes = [{}]
        self.members = {}
        self.read = set()

    def type_of(self, node):
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.members.get(node.attr)
            return TYPES.get(self.type_of(node.value), {}).get(node.attr)
        if isinstance(node, ast.Subscript):
            return element(self.type_of(node.value))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.returns.get(node.func.id)
        if isinstance(node, (ast.Tuple, ast.List)):  # (*config.data.sources, *config.data.validation)
            inner = {self.type_of(e.value) if isinstance(e, ast.Starred) else None for e in node.elts}
            return inner.pop() if len(inner) == 1 else None
        return None

    def bind(self, target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self.bind(one, other)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call):  # for a, b in zip(x, y)
            if isinstance(value.func, ast.Name) and value.func.id == "zip":
                for one, other in zip(target.elts, value.args, strict=False):
                    self.bind_type(one, self.type_of(other))
        else:
            self.bind_type(target, self.type_of(value))

    def bind_type(self, target, found):
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = found
        elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self" and found:
            self.members[target.attr] = found

    def bind_element(self, target, iterated):
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = element(self.type_of(iterated))
        elif isinstance(iterated, ast.Call) and isinstance(target, ast.Tuple):
            for one, other in zip(target.elts, iterated.args, strict=False):
                self.bind_type(one, element(self.type_of(other)))

    def visit_ClassDef(self, node):
        outer, self.members = self.members, {}
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                self.members[part.target.id] = annotated(part.annotation)
        for part in node.body:  # __init__ first: it says what self holds
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                self.visit(part)
        self.generic_visit(node)
        self.members = outer

    def visit_FunctionDef(self, node):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.scopes.append({a.arg: annotated(a.annotation) for a in arguments})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_For(self, node):
        self.bind_element(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node):
        self.bind_element(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node):
        self.scopes.append({})
        for generator in node.generators:
            self.visit(generator)
        self.generic_visit(node)
        self.scopes.pop()

    visit_GeneratorExp = visit_SetComp = visit_DictComp = visit_ListComp

    def visit_Attribute(self, node):
        section = self.type_of(node.value)
        if isinstance(node.ctx, ast.Load) and section in TYPES:
            self.read |= {f"{section.__name__}.{name}" for name in behind(section, node.attr)}
        self.generic_visit(node)


@functools.cache
def behind(section, name):
    """The fields that reading `name` reads: itself, or what a derived property of the section is made of."""
    found = vars(section).get(name)
    if not isinstance(found, property):
        return {name}
    tree = ast.parse(textwrap.dedent(inspect.getsource(found.fget)))
    return {
        field
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
        for field in behind(section, node.attr)
    }


def element(found):
    return typing.get_args(found)[0] if typing.get_origin(found) is list else None


def fields_read(sources):
    """`Section.field` of every read in `sources`."""
    trees = [ast.parse(source) for source in sources]
    returns = {
        node.name: annotated(node.returns)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    } | {"load_config": schema.RunConfig, "load_yaml": schema.RunConfig}
    found = set()
    for tree in trees:
        reader = Reader(returns)
        reader.visit(tree)
        found |= reader.read
    return found & FIELDS


def rules():
    return [path.read_text(encoding="utf-8") for path in (ROOT / "megallama" / "config").glob("check_*.py")]


def outside_of_config():
    files = [*sorted((ROOT / "megallama").rglob("*.py")), *sorted((ROOT / "launch").glob("*.py"))]
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in files
        # verify only resizes a run, and export only writes a shape down: what nobody else reads is not read.
        if path.parent.name not in ("config", "verification")
        and path.relative_to(ROOT).as_posix() not in SHAPE_ONLY
    }


def test_every_field_is_read():
    unread = FIELDS - fields_read(outside_of_config().values())
    assert unread == LIMITS
    assert fields_read(rules()) >= LIMITS


@pytest.mark.parametrize(
    ("without", "lost"),
    [
        ("megallama/engine/learning_rate.py", {"OptimConfig.warmup_steps", "OptimConfig.min_lr_ratio"}),
        ("megallama/model/rope.py", {"ModelConfig.rope_theta", "ModelConfig.rope_scaling"}),
        ("megallama/stream/open.py", {"SourceConfig.path", "SourceConfig.weight", "MixConfig.from_step"}),
        ("megallama/metrics/recorder.py", {"LogConfig.wandb_project", "LogConfig.tensorboard"}),
    ],
)
def test_a_field_that_nobody_reads_is_found(without, lost):
    sources = outside_of_config()
    del sources[without]
    assert FIELDS - fields_read(sources.values()) >= lost


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("def f(config: RunConfig): return config.optim.lr", {"OptimConfig.lr"}),
        ("def f(c: RunConfig):\n    a, b = c.optim, c.train\n    return a.lr", {"OptimConfig.lr"}),
        ("def f(c: RunConfig):\n    a, b = c.optim, c.train\n    return b.steps", {"TrainConfig.steps"}),
        (
            "def f(c: 'RunConfig'): return [s.path for s in c.data.sources]",
            {"DataConfig.sources", "SourceConfig.path"},
        ),
        ("def f(s: Sequence[SourceConfig]): return s[0].weight", {"SourceConfig.weight"}),
        (
            "class A:\n    def g(self): return self.c.lr\n    def __init__(self, c: OptimConfig): self.c = c",
            {"OptimConfig.lr"},
        ),
        ("class A:\n    c: OptimConfig\n    def g(self): return self.c.lr", {"OptimConfig.lr"}),
        ("def f(m: ModelConfig): return m.kv_heads", {"ModelConfig.num_kv_heads", "ModelConfig.num_heads"}),
        (
            "def f(m: ModelConfig): return m.query_width",  # made of another property
            {"ModelConfig.num_heads", "ModelConfig.head_dim", "ModelConfig.hidden_size"},
        ),
        ("def f(config): return config.optim.lr", set()),
        ("def f(config: Other): return config.optim.lr", set()),
        ("def f(optim: OptimConfig):\n    optim = 1\n    return optim.lr", set()),
        ("def f(optim: OptimConfig): return 'optim.lr', lr", set()),
        ("def f(c: RunConfig): return c.optim", set()),
    ],
)
def test_what_counts_as_reading(source, read):
    assert fields_read([source]) == read
