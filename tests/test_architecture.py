"""The rules of the tree, read from the source: who imports whom, file sizes, what is never used, what README names."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "stepvideo_serve"
MAX_LINES = 400
NOT_OURS = ("build", "out")  # at the top level only, besides what begins with a dot

VOCABULARY = ("errors", "geometry", "request", "config")
# Rooms from the lowest to the highest: each may import those of the lines above its own, and the vocabulary.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("weights", "engine", "parallel", "video", "launch"),
    ("text", "vae", "scheduling"),
    ("dit",),
    ("fused", "sampling"),
    ("pipeline",),
    ("memory",),
    ("assembly",),
    ("planning",),
    ("doctor", "serving"),
    ("__main__",),
)
# Rooms that need less than their floor allows.
NARROW: Mapping[str, tuple[str, ...]] = {
    "errors": (),
    "geometry": ("errors",),
    "weights": ("errors",),
    "engine": ("errors",),
    "parallel": ("errors",),
    "launch": ("errors",),
    "scheduling": ("errors", "geometry", "parallel", "request"),
}
STAGES = ("text", "vae", "dit", "fused", "sampling", "video", "pipeline")
TORCH = ("torch", "numpy")
# What a room may import from outside, besides the standard library.
FROM_OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "errors": (),
    "geometry": (),
    "request": ("numpy",),
    "config": (),
    "__main__": (),
    "__init__": (),
    "weights": (*TORCH, "safetensors"),
    "engine": (*TORCH, "onnxruntime", "onnx"),
    "parallel": TORCH,
    "video": (*TORCH, "PIL", "imageio", "imageio_ffmpeg"),
    "launch": (),
    "text": (*TORCH, "transformers", "sentencepiece"),
    "vae": TORCH,
    "scheduling": ("numpy",),
    "dit": TORCH,
    "fused": (*TORCH, "stepvideo_kernels"),
    "sampling": TORCH,
    "pipeline": TORCH,
    "memory": (),
    "assembly": (*TORCH, "transformers", "stepvideo_kernels"),
    "planning": TORCH,
    "doctor": ("torch", "stepvideo_kernels"),
    "serving": (*TORCH, "triton_python_backend_utils", "opentelemetry"),
}
# Modules whose processes must start in a moment or keep little memory -> what importing them must not load.
LIGHT: Mapping[str, tuple[str, ...]] = {
    "stepvideo_serve.__main__": (*TORCH, "stepvideo_serve.config"),
    "stepvideo_serve.launch.server": (*TORCH, "stepvideo_serve.config"),
    "stepvideo_serve.launch.supervise": (*TORCH, "stepvideo_serve.config"),
    "stepvideo_serve.launch.health": (*TORCH, "stepvideo_serve.config"),
    "stepvideo_serve.serving.denoiser": ("torch",),
    "stepvideo_serve.serving.cancel": ("torch",),
}
CLIENT_MAY_IMPORT = ("stepvideo_client", "numpy", "tritonclient", "grpc", "google.protobuf")
EVALUATION = "client/stepvideo_client/evaluation"
EVALUATION_MAY_IMPORT = (*CLIENT_MAY_IMPORT, "imageio", "imageio_ffmpeg", "PIL", "skimage", "cv2")
GATEWAY_MAY_IMPORT = (
    *("stepvideo_gateway", "stepvideo_client", "fastapi", "starlette", "uvicorn", "sqlalchemy", "alembic"),
    *("httpx2", "imageio_ffmpeg", "PIL", "prometheus_client"),
)
# ComfyUI loads its nodes under a name made of their path, so these alone import each other relatively.
COMFYUI = "comfyui"
COMFYUI_MAY_IMPORT = ("aiohttp", "PIL")
COMFYUI_ITSELF = ("comfy_api", "comfy.model_management", "server.PromptServer")
SERVER_API = "triton_python_backend_utils"
VENDOR = ("tensorrt", "tensorrt_rtx", "onnxruntime")
PICKLING_MODULES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
PICKLING_CALLS = ("torch.save", "broadcast_object_list", "all_gather_object", "send_object_list", "recv_object_list")
TEXT_FILES = (".py", ".toml", ".md", ".pbtxt", ".json", ".yaml", ".yml", ".sh", ".txt", "Makefile", "Dockerfile", "run")


def files(*suffixes: str) -> list[Path]:
    """The files of the checkout whose names end so, without what was built or installed."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(ROOT):
        built = NOT_OURS if Path(folder) == ROOT else ()
        ours = [name for name in subfolders if name not in built and not name.endswith((".egg-info", "__pycache__"))]
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


def room_of(path: Path) -> str:
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


def allowed_rooms() -> dict[str, tuple[str, ...]]:
    """Room -> the rooms that it may import, besides itself."""
    allowed: dict[str, tuple[str, ...]] = {"__init__": ()}
    allowed.update(dict.fromkeys(VOCABULARY, VOCABULARY))
    below: tuple[str, ...] = VOCABULARY
    for floor in FLOORS:
        allowed.update(dict.fromkeys(floor, below))
        below += floor
    return {**allowed, **NARROW}


def test_every_room_has_a_floor_and_a_rule() -> None:
    rooms = {room_of(path) for path in sources(PACKAGE)}
    assert rooms == allowed_rooms().keys() == FROM_OUTSIDE.keys() | {"__init__"}


def test_no_room_imports_a_higher_one() -> None:
    allowed = allowed_rooms()
    wrong = []
    for path, name in imported(sources(PACKAGE)):
        room = room_of(path)
        if within(name, (PACKAGE,)) and not within(name.removeprefix(f"{PACKAGE}."), (*allowed[room], room)):
            wrong.append(f"{path}: {name}")
    assert not wrong


def test_each_room_needs_only_what_it_may_from_outside() -> None:
    wrong = []
    for path, name in imported(sources(PACKAGE)):
        if not within(name, (PACKAGE, *FROM_OUTSIDE[room_of(path)])) and not is_standard(name):
            wrong.append(f"{path}: {name}")
    assert not wrong


@pytest.mark.parametrize("module", LIGHT)
def test_light_processes_stay_light(module: str) -> None:
    """Imported in a process of its own, as the server's launcher, its probes and the stub of dit_denoiser do."""
    unwanted = LIGHT[module]
    server_api = "sys.modules['triton_python_backend_utils'] = types.ModuleType('triton_python_backend_utils')"
    code = f"import sys, types; {server_api}; import {module}; print([n for n in {unwanted!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_only_the_vocabulary_is_loose_in_the_package() -> None:
    loose = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert loose | {"request"} == {*VOCABULARY, "__init__", "__main__"}, "request is a folder"


def module_of(path: Path) -> str:
    """The dotted name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[parts[0] in ("kernels", "client", "gateway") :]).removesuffix(".__init__")


def test_no_circle_of_imports_between_files() -> None:
    """Imports inside functions count too: a circle there is one all the same."""
    folders = (PACKAGE, "export", "kernels", "client", "gateway", "perf", "release", "toyworld", COMFYUI)
    paths = {module_of(path): path for path in sources(*folders)}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        found = set()
        for named in imports(ast.walk(parse(path))):
            name = f"{COMFYUI}.{named.lstrip('.')}" if named.startswith(".") else named
            target = next((n for n in (name, name.rpartition(".")[0]) if n in paths), None)
            found |= {target} if target and target != module else set()
        graph[module] = found
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the files


def test_the_folders_of_tests_are_those_of_the_code() -> None:
    rooms = {room_of(path) for path in sources(PACKAGE)} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"}
    known = "engines: TensorRT builds; evaluation: the client's extra; fakes: a machine with GPUs; gpu: what needs one"
    known += "; web: the gateway's page"
    assert folders - rooms == {"engines", "evaluation", "fakes", "gpu", "web"}, known


def test_stages_know_no_backend_and_no_ranks() -> None:
    hidden = (*VENDOR, SERVER_API, "torch.distributed")
    stages = [path for path in sources(PACKAGE) if room_of(path) in STAGES]
    assert not [(path, name) for path, name in imported(stages) if within(name, hidden)]


def test_serving_alone_talks_to_the_server() -> None:
    others = [path for path in code() if not path.is_relative_to(ROOT / PACKAGE / "serving")]
    assert not [(path, name) for path, name in imported(others) if within(name, (SERVER_API,))]


def test_vendor_modules_are_imported_inside_the_runner_that_needs_them() -> None:
    found = [(path, name) for path in sources(PACKAGE) for name in imports(while_importing(parse(path)))]
    assert not [(path, name) for path, name in found if within(name, VENDOR)]


def test_nothing_that_serves_imports_export() -> None:
    """The toy world, the benchmarks and the tests may."""
    others = sources(PACKAGE, "client", "gateway", "kernels", "model_repository", COMFYUI)
    assert not [(path, name) for path, name in imported(others) if within(name, ("export", "release"))]
    assert not [(path, name) for path, name in imported(sources("export")) if within(name, ("toyworld", "perf"))]


def test_the_gateway_imports_nothing_of_the_server() -> None:
    found = imported(sources("gateway"))
    assert found
    assert not [(path, name) for path, name in found if not within(name, GATEWAY_MAY_IMPORT) and not is_standard(name)]


def test_comfyuis_nodes_speak_http_and_one_file_knows_comfyui() -> None:
    found = imported(sources(COMFYUI))
    assert found
    for path, name in found:
        itself = COMFYUI_ITSELF if path.name == "host.py" else ()
        assert name.startswith(".") or within(name, (*COMFYUI_MAY_IMPORT, *itself)) or is_standard(name), (path, name)


def test_the_client_needs_only_numpy_and_tritonclient() -> None:
    for path, name in imported(sources("client")):
        may_import = EVALUATION_MAY_IMPORT if path.is_relative_to(ROOT / EVALUATION) else CLIENT_MAY_IMPORT
        assert within(name, may_import) or is_standard(name), path


def test_the_client_starts_without_its_extra() -> None:
    others = [path for path in sources("client") if not path.is_relative_to(ROOT / EVALUATION)]
    extra = [name for _, name in imported(others) if within(name, ("stepvideo_client.evaluation",))]
    assert extra == ["stepvideo_client.evaluation.commands.add_commands"]
    loading = imports(while_importing(parse(ROOT / EVALUATION / "commands.py")))
    assert all(within(name, CLIENT_MAY_IMPORT) or is_standard(name) for name in loading)


def test_imports_are_absolute() -> None:
    others = [path for path in files(".py") if path.parent != ROOT / COMFYUI]
    assert not [(path, name) for path, name in imported(others) if name.startswith(".")]


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
