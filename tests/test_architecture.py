"""The rules of the tree, read from the source: who imports whom, file sizes, what is never used, what README names."""

import ast
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "stepvideo_serve"
MAX_LINES = 400
NOT_OURS = ("build", "out")  # besides what begins with a dot

BASE = ("errors", "geometry", "request")
READERS = ("json_file", "communicator", "sharding")  # what stages may also use
STAGES = ("text", "vae", "dit", "sampling", "video")
OF_STAGES = (*BASE, *READERS, "engine.spec")
# Part of the package -> the parts of it that it may import, besides itself. The others are free.
MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(BASE, BASE),
    "json_file": ("errors",),
    "communicator": (),
    "sharding": ("errors",),
    **dict.fromkeys(STAGES, OF_STAGES),
    "dit": (*OF_STAGES, "text.states"),
    "sampling": (*OF_STAGES, "text.states", "dit.velocity"),
    "engine": ("errors",),
    "parallel": ("errors",),
    "tritonserver": ("errors", "server_options", "server_release", "triton_install"),
    "server_options": ("server_security",),
    "server_release": ("errors",),
    "server_security": ("errors", "server_release"),
    "triton_install": ("errors",),
    "health": (),
    "supervise": ("errors", "health", "server_options", "triton_install", "tritonserver"),
}
# Part of the package -> all that it may import from outside, besides the standard library.
FROM_OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "errors": (),
    "geometry": (),
    "tritonserver": (),
    "server_options": (),
    "server_release": (),
    "server_security": (),
    "triton_install": (),
    "health": (),
    "supervise": (),
    "parallel": ("torch", "numpy"),
}
CLIENT_MAY_IMPORT = ("stepvideo_client", "numpy", "tritonclient", "grpc", "google.protobuf")
SERVER_API = "triton_python_backend_utils"
VENDOR = ("tensorrt", "tensorrt_rtx", "onnxruntime")
PICKLING_MODULES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
PICKLING_CALLS = ("torch.save", "broadcast_object_list", "all_gather_object", "send_object_list", "recv_object_list")
TEXT_FILES = (".py", ".toml", ".md", ".pbtxt", ".json", ".yaml", ".yml", ".sh", ".txt", "Makefile", "Dockerfile", "run")


def files(*suffixes: str) -> list[Path]:
    """The files of the checkout whose names end so, without what was built or installed."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(ROOT):
        ours = [name for name in subfolders if name not in NOT_OURS and not name.endswith((".egg-info", "__pycache__"))]
        subfolders[:] = [name for name in ours if name[0] != "." or name == ".ci"]
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(found)


def sources(*folders: str) -> list[Path]:
    """The Python files below these top-level folders."""
    return [path for path in files(".py") if path.relative_to(ROOT).parts[0] in folders]


def code() -> list[Path]:
    """The Python files that are not tests."""
    return [path for path in files(".py") if path.relative_to(ROOT).parts[0] != "tests"]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part_of(path: Path) -> str:
    """stepvideo_serve/text/step_llm.py -> text; stepvideo_serve/errors.py -> errors."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names; `from a.b import c` gives a.b.c, since c may be a module. Relative imports begin with a dot."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{name.name}" for name in node.names)


def while_importing(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not function bodies, not `if TYPE_CHECKING:`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether `name` is one of the modules or something in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def imported(paths: list[Path]) -> list[tuple[Path, str]]:
    return [(path, name) for path in paths for name in imports(ast.walk(parse(path)))]


def test_each_part_of_the_package_imports_only_what_it_may() -> None:
    wrong = []
    for path, name in imported(sources(PACKAGE)):
        part = part_of(path)
        allowed = (*MAY_IMPORT.get(part, ()), part)
        ours = within(name, (PACKAGE,)) and part in MAY_IMPORT
        if ours and not within(name.removeprefix(f"{PACKAGE}."), allowed):
            wrong.append(f"{path}: {name}")
    assert not wrong, f"allowed, besides the own folder: {MAY_IMPORT}"


def test_each_part_of_the_package_needs_only_what_it_may_from_outside() -> None:
    wrong = []
    for path, name in imported(sources(PACKAGE)):
        allowed = FROM_OUTSIDE.get(part_of(path))
        if allowed is not None and not within(name, (PACKAGE, *allowed)) and not is_standard(name):
            wrong.append(f"{path}: {name}")
    assert not wrong, f"allowed: {FROM_OUTSIDE}"


def test_stages_know_no_backend_and_no_ranks() -> None:
    hidden = (*VENDOR, SERVER_API, "torch.distributed")
    stages = [path for path in sources(PACKAGE) if part_of(path) in STAGES]
    assert not [(path, name) for path, name in imported(stages) if within(name, hidden)]


def test_serving_alone_talks_to_the_server() -> None:
    others = [path for path in code() if not path.is_relative_to(ROOT / PACKAGE / "serving")]
    assert not [(path, name) for path, name in imported(others) if within(name, (SERVER_API,))]


def test_vendor_modules_are_imported_inside_the_runner_that_needs_them() -> None:
    found = [(path, name) for path in sources(PACKAGE) for name in imports(while_importing(parse(path)))]
    assert not [(path, name) for path, name in found if within(name, VENDOR)]


def test_nothing_imports_export_but_the_price_list() -> None:
    """It prices what the tools of export make of a checkpoint; they know nothing of it."""
    others = sources(PACKAGE, "client", "kernels", "toyworld", "model_repository")
    found = {path.name for path, name in imported(others) if within(name, ("export",))}
    assert found == {"fp8_graphs.py", "price_stages.py"}
    assert not [(path, name) for path, name in imported(sources("export")) if within(name, ("toyworld",))]


def test_the_client_needs_only_numpy_and_tritonclient() -> None:
    found = imported(sources("client"))
    assert not [(path, name) for path, name in found if not within(name, CLIENT_MAY_IMPORT) and not is_standard(name)]


def test_imports_are_absolute() -> None:
    assert not [(path, name) for path, name in imported(files(".py")) if name.startswith(".")]


def test_file_sizes() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(".py")}
    assert not {path: lines for path, lines in sizes.items() if lines > MAX_LINES}, "split these by purpose"


def test_no_pickling_module() -> None:
    assert not [(path, name) for path, name in imported(code()) if within(name, PICKLING_MODULES)]


def test_no_call_that_pickles_loads_loosely_or_opens_a_shell() -> None:
    for path in code():
        for call in (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
            where = f"{path}:{call.lineno}: {function}"
            assert not function.endswith(PICKLING_CALLS), where
            assert given.get("allow_pickle") is not True, where
            assert given.get("shell") is not True, where
            assert given.get("strict") is not False or function.split(".")[-1] != "load_state_dict", where
            assert given.get("weights_only") is True or function != "torch.load", where


def test_no_machine_paths() -> None:
    pattern = re.compile(r"(?<![\w.-])/(?:work|farm|root|home|Users)/[.\w]")
    for path in files(*TEXT_FILES):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path}:{number}"


PATH_LIKE = re.compile(
    r"[\w./*-]*[\w*](?:/|\.(?:py|toml|md|pbtxt|json|yaml|yml|sh|txt|png))|Makefile|Dockerfile|LICENSE"
)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def tree_entries(block: str) -> Iterator[str]:
    """The paths of an indented tree: on each line the path-like words before the description.

    A line that begins with a folder is the parent of the lines below it that are indented deeper.
    """
    parents: list[tuple[int, str]] = []
    for line in block.splitlines():
        text = line.lstrip(" │├└─")
        indent = len(line) - len(text)
        parents = [(depth, folder) for depth, folder in parents if depth < indent]
        prefix = parents[-1][1] if parents else ""
        words = text.split()
        names = words[: next((i for i, word in enumerate(words) if not PATH_LIKE.fullmatch(word)), len(words))]
        yield from (prefix + name for name in names)
        if names and names[0].endswith("/"):
            parents.append((indent, prefix + names[0]))


def test_tree_entries() -> None:
    block = "a/      what a.py is\n  b/  c.py  text here d.py\n  e.py f.py\nMakefile\n├── g/h.md  about"
    assert list(tree_entries(block)) == ["a/", "a/b/", "a/c.py", "a/e.py", "a/f.py", "Makefile", "g/h.md"]


def test_the_tree_in_the_readme_exists() -> None:
    found = re.search(r"^## The tree\n.*?^```\w*\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    assert found, 'README.md must have a fenced block under "## The tree"'
    entries = list(tree_entries(found[1]))
    assert len(entries) > 10
    assert not [entry for entry in entries if not any(ROOT.glob(entry.rstrip("/")))]


def test_the_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", makefile, re.MULTILINE))
    pieces = re.findall(r"^```.*?^```|`[^`\n]+`", readme(), re.MULTILINE | re.DOTALL)
    named = {target for piece in pieces for target in re.findall(r"\bmake ([a-z][a-z-]*)", piece)}
    assert {"demo", "test"} <= named <= targets
