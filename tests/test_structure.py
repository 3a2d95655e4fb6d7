"""The rules of the code's shape, held over syntax trees: imports, names, sizes, and what never appears.

`ALLOWED` names exceptions as "path: rule", and should stay empty. Each rule is a function from source to
offenders, tried on made-up sources first, so that a rule which finds nothing has been seen to find something.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "moestro"

# Imports go down this list only. Sub-packages in one row are independent of each other.
LAYERS = (
    ("terminal", "version", "packages", "scores"),
    ("errors",),
    ("config",),
    ("machine", "sizes", "checks"),
    ("data", "routing"),
    ("ops",),
    ("model",),
    ("checkpoints",),
    ("parallel",),
    ("engine",),
    ("training",),
    ("compare",),
    ("report",),
    ("server",),
    ("cli",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
TOP = frozenset({"__init__", "__main__"})  # the package's own face, above every layer

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_NESTING = 3
MAX_POSITIONAL = 6
MAX_PRESET_LINES = 40
MAX_README_LINES = 200

ALLOWED: frozenset[str] = frozenset({"moestro/checkpoints/packing.py: class names"})

FORBIDDEN_MODULES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
FORBIDDEN_ATTRIBUTES = frozenset({"torch.load", "torch.save", "os.system", "os.popen"})
FORBIDDEN_TRUE = frozenset({"shell", "allow_pickle"})
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


def test_imports_go_down() -> None:
    check("import direction", PACKAGE, import_offenders)


def test_no_modules_import_each_other() -> None:
    circle = find_circle(package_sources())
    assert not circle, "these import each other: " + " -> ".join(circle)


def test_no_two_classes_share_a_name() -> None:
    sources = {name: source for name, source in package_sources().items() if f"{name}: class names" not in ALLOWED}
    assert shared_class_names(sources) == []


def test_messages_of_the_library_name_no_flags() -> None:
    check("flags", PACKAGE, lambda path, source: [] if "cli" in path.parts else flags_in_messages(source))


def test_files_are_short() -> None:
    check("file length", ROOT, lambda path, source: long_file(source))


def test_functions_are_short_flat_and_take_few_positional_parameters() -> None:
    check("function shape", ROOT, lambda path, source: function_offenders(source))


def test_nothing_executes_data() -> None:
    check("forbidden code", PACKAGE, lambda path, source: forbidden_code(source))


def test_every_module_says_what_it_does() -> None:
    check(
        "docstring",
        PACKAGE,
        lambda path, source: [] if ast.get_docstring(ast.parse(source)) else ["has none"],
    )


def test_presets_are_short_toml() -> None:
    for path in sorted((PACKAGE / "presets").rglob("*.toml")):
        text = path.read_text("utf-8")
        assert tomllib.loads(text), f"{path.name} is empty"
        assert len(text.splitlines()) <= MAX_PRESET_LINES, f"{path.name} is longer than {MAX_PRESET_LINES} lines"


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES, f"README.md has {len(lines)} lines"


def test_exceptions_are_still_needed() -> None:
    stale = [entry for entry in ALLOWED if not (ROOT / entry.split(":")[0]).exists()]
    assert not stale, f"ALLOWED names files that are gone: {stale}"


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("model/block.py", "from moestro.training.loop import run", "moestro.training.loop.run"),
        ("model/block.py", "import moestro.engine.pages", "moestro.engine.pages"),
        ("model/block.py", "from moestro import cli", "moestro.cli"),
        ("model/block.py", "from ..training import loop", "moestro.training.loop"),
        ("model/block.py", "def f():\n    from moestro.cli import main", "moestro.cli.main"),
        ("routing/router.py", "from moestro.ops import grouped", "moestro.ops.grouped"),
        ("engine/engine.py", "from moestro.training import loop", "moestro.training.loop"),
        ("training/loop.py", "from moestro import load", "moestro.load"),
        ("training/loop.py", "import moestro\nmoestro.load(x)", "moestro.load"),
        ("training/loop.py", "import moestro as m", "moestro"),
        ("training/loop.py", "from moestro import __version__", "moestro.__version__"),
        ("data/shards.py", "if TYPE_CHECKING:\n    from moestro.engine.engine import Engine", "moestro.engine.engine"),
        ("novelty/thing.py", "import math", "novelty"),
    ],
)
def test_an_import_upwards_is_found(module: str, source: str, imported: str) -> None:
    (offence,) = import_offenders(PACKAGE / module, source)
    assert imported in offence


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training/loop.py", "from moestro.engine import engine\nfrom .loss import terms\nfrom . import step"),
        ("model/block.py", "import math, torch\nfrom moestro.ops.training.reference import experts"),
        ("training/loop.py", "from moestro import config\nfrom moestro.version import __version__"),
        ("routing/__init__.py", "from .router import route"),
        ("__init__.py", "def load(path):\n    from moestro.cli import main"),
    ],
)
def test_an_import_downwards_passes(module: str, source: str) -> None:
    assert import_offenders(PACKAGE / module, source) == []


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"a/x.py": "from moestro.a import y", "a/y.py": "from moestro.a.x import X"}, "a/x.py a/y.py"),
        ({"a/x.py": "from .y import Y", "a/y.py": "from . import x"}, "a/x.py a/y.py"),
        ({"a/x.py": "if TYPE_CHECKING:\n    from .y import Y", "a/y.py": "import moestro.a.x"}, "a/x.py a/y.py"),
        ({"a/x.py": "from .y import Y", "a/y.py": "def f():\n    from moestro.a.x import X"}, "a/x.py a/y.py"),
        ({"__init__.py": "from moestro.a import x", "a/x.py": "import moestro\nmoestro.f()"}, "__init__.py a/x.py"),
        (
            {"a/x.py": "import moestro.b.y", "b/y.py": "from .z import Z", "b/z.py": "import moestro.a.x"},
            "a/x.py b/y.py b/z.py",
        ),
        ({"a/x.py": "from .y import Y\nfrom .z import Z", "a/y.py": "from .z import Z", "a/z.py": "import math"}, ""),
        ({"__init__.py": "from moestro.a import x", "a/x.py": "from moestro.a import a_function"}, ""),
    ],
)
def test_modules_that_import_each_other_are_found(sources: dict[str, str], circle: str) -> None:
    named = {f"moestro/{name}": source for name, source in sources.items()}
    named.setdefault("moestro/__init__.py", "")
    named |= {f"moestro/{name.split('/')[0]}/__init__.py": "" for name in sources if "/" in name}
    assert set(find_circle(named)) == {f"moestro/{name}" for name in circle.split()}


def test_classes_that_share_a_name_are_found() -> None:
    sources = {"a.py": "class Plan: pass\nclass _Own: pass", "b.py": "def f():\n    class Plan: pass\nclass _Own: pass"}
    assert shared_class_names(sources) == ["Plan is in a.py, b.py"]
    assert shared_class_names({"a.py": "class Plan: pass\nclass Plans: pass"}) == []


def test_flags_in_messages_are_found() -> None:
    assert flags_in_messages("raise ConfigError('choose another --out')")
    assert flags_in_messages("raise ConfigError(f'{a}: 1' + f'{b} needs --jobs') from error")
    assert flags_in_messages("raise ConfigError('a -- b', hint=f'{a}: choose another --out')") == []
    assert flags_in_messages("text = 'see --out'\nraise ValueError(text)") == []


def test_shapes_are_measured() -> None:
    assert long_file("x = 1\n" * 500) == []
    assert long_file("x = 1\n" * 501)
    assert function_offenders("def f():\n" + "    x = 1\n" * 59) == []
    assert "60" in function_offenders("def f():\n" + "    x = 1\n" * 60)[0]
    assert function_offenders("def f(a, b, c, d, e, f, *, g, h): pass") == []
    assert function_offenders("def f(a, b, c, /, d, e, f, g): pass")
    assert function_offenders("class C:\n    def f(self, a, b, c, d, e, f): pass") == []
    deep = "def f():\n  for a in b:\n    with a:\n      try:\n        {}\n      finally: pass"
    assert function_offenders(deep.format("x = 1")) == []
    assert function_offenders(deep.format("if x: y()"))
    assert function_offenders(deep.format("def g():\n          if x: y()")) == []
    chain = "def f():\n  if a: pass\n" + "".join(f"  elif a == {n}: pass\n" for n in range(9)) + "  else: pass"
    assert function_offenders(chain) == []
    assert function_offenders("def f():\n  try: pass\n  except E:\n    if a:\n      if b:\n        if c: pass")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\nx = torch.load(p)",
        "from torch import load",
        "eval('1')",
        "exec(code)",
        "run(c, shell=True)",
        "M.from_pretrained(p, trust_remote_code=False)",
        "np.load(p, allow_pickle=True)",
        "os.system('ls')",
    ],
)
def test_forbidden_code_is_found(source: str) -> None:
    assert len(forbidden_code(source)) == 1


def test_what_only_looks_forbidden_passes() -> None:
    assert forbidden_code("model.eval()\nnp.load(p, allow_pickle=False)\n'import pickle; eval(x)'") == []


def check(rule: str, folder: Path, find: Callable[[Path, str], list[str]]) -> None:
    """Fail with one line for every offence of the Python files below `folder`."""
    offences = [
        f"{path.relative_to(ROOT)}: {offence}"
        for path in python_files(folder)
        if f"{path.relative_to(ROOT)}: {rule}" not in ALLOWED
        for offence in find(path, path.read_text("utf-8"))
    ]
    assert not offences, f"{rule}:\n" + "\n".join(offences)


def python_files(folder: Path) -> list[Path]:
    """The Python files of the package, and of tests and benchmarks where `folder` is the root."""
    folders = [PACKAGE, ROOT / "tests", ROOT / "bench"] if folder == ROOT else [folder]
    return sorted(path for top in folders for path in top.rglob("*.py"))


def import_offenders(path: Path, source: str) -> list[str]:
    """Imports, at any depth of the source, of a layer above or beside the module's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = parts[0]
    if own not in RANK and own not in TOP:
        return [f"layer '{own}' is not in LAYERS; add it where it belongs"]
    offences = []
    for line, name in imported_names(parts, source):
        target = name.split(".")[1] if "." in name else "__init__"
        down = RANK.get(target, len(LAYERS)) < RANK.get(own, len(LAYERS))
        if own not in TOP and target != own and not down:
            offences.append(f"line {line} imports {name}")
    return offences


def imported_names(parts: tuple[str, ...], source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import from this package, relative ones resolved.

    After a plain `import moestro`, what counts is what is then taken from it.
    """
    package = ("moestro", *parts[:-1])
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name != "moestro" or alias.asname]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "moestro":
            names = [f"moestro.{node.attr}"]
        yield from ((getattr(node, "lineno", 0), name) for name in names if name.split(".")[0] == "moestro")


def package_sources() -> dict[str, str]:
    """The source of every module of the package, by its path."""
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in python_files(PACKAGE)}


def find_circle(sources: Mapping[str, str]) -> list[str]:
    """Paths of modules that import each other in turn, the first one also last; empty if there are none.

    Every import counts: those inside a package, inside a function, and those for type checking alone.
    """
    paths = {dotted_name(path): path for path in sources}
    graph: dict[str, set[str]] = {path: set() for path in sources}
    for path, source in sources.items():
        for _, name in imported_names(Path(path).relative_to("moestro").with_suffix("").parts, source):
            while name not in paths:  # a function, a class or a constant of the module before it
                name = name.rpartition(".")[0]
            graph[path] |= {paths[name]} - {path}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def dotted_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def shared_class_names(sources: Mapping[str, str]) -> list[str]:
    """Public classes that have the name of another one, and where they are."""
    places = defaultdict(list)
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    return [f"{name} is in {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1]


def flags_in_messages(source: str) -> list[str]:
    """Flags of the command line in the messages of exceptions that are raised; a `hint=` may name them."""
    calls = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    messages = [argument for call in calls if isinstance(call, ast.Call) for argument in call.args]
    texts = [(node.lineno, node.value) for m in messages for node in ast.walk(m) if isinstance(node, ast.Constant)]
    return [f"line {line} says {text!r}" for line, text in texts if re.search(r"(^|\W)--[a-z]", str(text))]


def long_file(source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{lines} lines, more than {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def function_offenders(source: str) -> list[str]:
    """Functions that are too long, too deep or take too many positional parameters (self is not counted)."""
    offences = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        names = [parameter.arg for parameter in (*node.args.posonlyargs, *node.args.args)]
        positional = len(names) - (names[:1] in (["self"], ["cls"]))
        depth = nesting(node)
        limits = ((lines, MAX_FUNCTION_LINES, "lines"), (depth, MAX_NESTING, "levels of nesting"))
        for value, limit, what in (*limits, (positional, MAX_POSITIONAL, "positional parameters")):
            if value > limit:
                offences.append(f"{node.name} (line {node.lineno}) has {value} {what}, more than {limit}")
    return offences


def nesting(node: ast.AST) -> int:
    """Blocks inside each other below a node; an elif is no level, an inner function counts for itself."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def forbidden_code(source: str) -> list[str]:
    """Uses of what runs or unpickles data: modules, attributes, eval and exec, unsafe keyword arguments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(module)
            case ast.ImportFrom(module=str(module), names=names):
                dotted = [f"{module}.{alias.name}" for alias in names]
                found += [name for name in dotted if name in FORBIDDEN_ATTRIBUTES]
            case ast.Attribute() if ast.unparse(node) in FORBIDDEN_ATTRIBUTES:
                found.append(ast.unparse(node))
            case ast.Call(func=ast.Name(id=("eval" | "exec") as name)):
                found.append(name)
            case ast.keyword(arg="trust_remote_code"):
                found.append("trust_remote_code")
            case ast.keyword(arg=str(name), value=ast.Constant(value=True)) if name in FORBIDDEN_TRUE:
                found.append(f"{name}=True")
    return [f"uses {name}" for name in found]
