"""Who may import whom, and that importing does nothing: read from the syntax trees, nothing is run."""

import ast
import builtins
import graphlib
import sys
from collections.abc import Iterator

from style.tree import PACKAGE, Module, modules

# The rooms, lowest first, and the rooms that each may import from. A file at the top of the package is ground, except
# for the pipeline. An arrow that is not in this table fails, and so does an entry that no import needs any more.
ROOMS: dict[str, str] = {
    "ground": "",
    "wire": "ground",
    "policy": "ground wire",
    "tables": "ground policy",
    "scanners": "ground wire policy",
    "verdict": "ground policy",
    "store": "ground wire policy verdict",
    "config": "ground policy scanners",
    "pipeline": "ground policy scanners verdict store",
    "doors": "ground wire policy verdict",
    "receiver": "ground wire doors",
    "bus": "ground policy tables scanners verdict config",
    "worker": "ground policy tables scanners verdict store config pipeline doors bus",
    "monitor": "ground wire policy tables scanners verdict store doors bus",
    "supervisor": "ground policy tables store config doors bus worker monitor",
    "admin": "ground wire policy tables scanners",
    "cli": "ground policy tables scanners verdict store config doors bus worker monitor supervisor admin",
}

# All that formats and decisions may use of the standard library: nothing here can wait, read or tell the time.
# Add a module if it computes only.
PURE = {
    "base64", "binascii", "bisect", "collections", "collections.abc", "dataclasses", "datetime", "enum", "functools",
    "heapq", "ipaddress", "itertools", "math", "operator", "re", "string", "struct", "types", "typing",
    "unicodedata", "zlib",
}  # fmt: skip
PURE_OUTSIDE = {"msgspec"}  # the frozen values that every message makes dozens of: in C, a tenth of a dataclass
PURE_OURS = ("errors", "model", "settings", "wire", "policy")

# Calls of these while a module is being imported would open, start or register something.
ACTIVE = {
    "aiofiles", "aiomysql", "asyncio", "clamd", "io", "logging", "mmap", "multiprocessing", "open", "os", "print",
    "prometheus_client", "random", "select", "selectors", "signal", "socket", "structlog", "subprocess", "sys",
    "tempfile", "threading", "time", "zmq",
}  # fmt: skip

COMPUTES = {"socket.CMSG_SPACE", "socket.CMSG_LEN"}  # the exceptions: arithmetic, whatever module it lives in


def imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """Each import with the full name of the module that it brings in, wherever in the file it stands."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.at(node)}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node, inner if inner.removeprefix("contentfilter.") in modules() else node.module


def ours(name: str) -> str | None:
    """The name without the package's, or None for somebody else's module."""
    if name == "contentfilter":
        return ""
    return name.removeprefix("contentfilter.") if name.startswith("contentfilter.") else None


def within(name: str, group: str) -> bool:
    return name == group or (bool(group) and name.startswith(group + "."))


def room(name: str) -> str:
    """The folder that a module lies in; ``ground`` for a file at the top of the package."""
    folder, dot, _ = name.partition(".")
    return folder if dot or folder == "pipeline" or (PACKAGE / folder).is_dir() else "ground"


def arrows() -> dict[tuple[str, str], list[str]]:
    """Each arrow between two rooms, and the imports that draw it. ``__main__`` only starts the command line."""
    found: dict[tuple[str, str], list[str]] = {}
    for module in modules().values():
        for node, name in imports(module) if module.name not in ("", "__main__") else ():
            target = ours(name)
            if target and room(target) != room(module.name):
                where = f"{module.at(node)}: {module.name} imports {target}"
                found.setdefault((room(module.name), room(target)), []).append(where)
    return found


def test_arrows_point_one_way() -> None:
    order = list(ROOMS)
    assert [(above, below) for above, names in ROOMS.items() for below in names.split() if below not in order] == []
    upward = [(a, b) for a, names in ROOMS.items() for b in names.split() if order.index(b) >= order.index(a)]
    assert upward == []


def test_every_arrow_is_allowed() -> None:
    wrong = [where for (a, b), places in arrows().items() if b not in ROOMS[a].split() for where in places]
    assert wrong == []


def test_the_table_of_arrows_has_nothing_that_is_not_needed() -> None:
    assert {(a, b) for a, names in ROOMS.items() for b in names.split()} - set(arrows()) == set()


def test_no_module_is_imported_by_a_string() -> None:
    """Except for commands, which load only what they need (cli/main.py)."""
    wrong = [
        module.at(node)
        for module in modules().values()
        for node, name in imports(module)
        if name == "importlib" and isinstance(node, ast.Import) and module.name != "cli.main"
    ]
    assert wrong == []


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {
        module.name: {target for _, name in imports(module) if (target := ours(name)) in modules() and target}
        for module in modules().values()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_formats_and_decisions_do_no_io() -> None:
    wrong = []
    for module in modules().values():
        if not any(within(module.name, group) for group in ("wire", "policy")):
            continue
        for node, name in imports(module):
            target = ours(name)
            pure = name in PURE | PURE_OUTSIDE if target is None else any(within(target, group) for group in PURE_OURS)
            if not pure:
                wrong.append(f"{module.at(node)}: {name}")
        wrong += [
            f"{module.at(node)}: {node.func.id}()"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"open", "print", "input"}
        ]
    assert wrong == []


def run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when the module is imported: all but the bodies of functions and the main block."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        elif not isinstance(node, ast.Lambda):
            todo += ast.iter_child_nodes(node)


def root_of(call: ast.Call) -> str:
    """``a`` of ``a.b.c(…)``; empty for anything else that is called."""
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def sources(module: Module) -> dict[str, str]:
    """Each name that an import binds, with the outermost module that it comes from."""
    found = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name).partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node.module or "" for alias in node.names}
    return {name: source.partition(".")[0] for name, source in found.items()}


def test_importing_has_no_side_effects() -> None:
    wrong = []
    for module in modules().values():
        source = sources(module)
        for node in run_at_import(module.tree):
            if isinstance(node, ast.Call):
                root, called = root_of(node), ast.unparse(node.func)
                if source.get(root, root) in ACTIVE and called not in COMPUTES:
                    wrong.append(f"{module.at(node)}: {called}() runs at import")
            elif isinstance(node, ast.With | ast.AsyncWith | ast.For | ast.While | ast.Await):
                wrong.append(f"{module.at(node)}: a block that runs at import")
        wrong += [
            f"{module.at(node)}: a bare call runs at import"
            for node in module.tree.body
            if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        ]
    assert wrong == []


def test_no_function_rebinds_a_global() -> None:
    wrong = [
        module.at(node)
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Global)
    ]
    assert wrong == []


def test_the_lists_name_real_modules() -> None:
    known = sys.stdlib_module_names
    assert {name for name in PURE if name.partition(".")[0] not in known} == set()
    outside = {"aiofiles", "aiomysql", "clamd", "prometheus_client", "structlog", "zmq"}
    assert {name for name in ACTIVE - outside if name not in known and not hasattr(builtins, name)} == set()
    assert not PURE & ACTIVE


def test_every_file_says_what_it_promises() -> None:
    assert [module.name for module in modules().values() if not ast.get_docstring(module.tree)] == []
