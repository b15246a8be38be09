"""What documents, docstrings, comments and configurations name exists: files of ours and dotted names of our packages.

A file may be named from the root of the checkout, from a package, or from a folder around the file that names it.
CHANGELOG.md alone tells of what was.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.test_architecture import ROOT, TEXT_FILES, files, module_of, parse

PACKAGES = ("stepvideo_serve", "kernels/stepvideo_kernels", "client/stepvideo_client", "gateway/stepvideo_gateway")
DOTTED = re.compile(
    r"(?<![\w./-])(?:stepvideo_serve|stepvideo_kernels|stepvideo_client|export|perf|toyworld)(?:\.[A-Za-z_]\w*)+"
)
FILE = re.compile(r"(?<![\w./<>*{-])[\w/]*\w\.py\b")
TREE = re.compile(r"^```(?:text)?\n.*?^```", re.MULTILINE | re.DOTALL)  # trees have a test of their own


def prose(path: Path) -> str:
    """What a person reads in a file: docstrings and comments of code, all of another text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(parse(path)) if isinstance(node, kinds)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join([*docstrings, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


def strings(path: Path) -> str:
    """Names that no import checks: factories, programs for `python -m`."""
    return "\n".join(
        node.value for node in ast.walk(parse(path)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def texts() -> Iterator[tuple[Path, str]]:
    for path in files(*TEXT_FILES, ".tpl"):
        if path.name != "CHANGELOG.md" and path.suffix != ".json" and path.stat().st_size < 200_000:
            yield path, prose(path)


def is_there(mention: str, path: Path) -> bool:
    around = [folder for folder in path.parents if folder.is_relative_to(ROOT)]
    return any((folder / mention).is_file() for folder in (*around, *(ROOT / package for package in PACKAGES)))


def modules() -> dict[str, str]:
    """Dotted name -> the source; that of a folder without __init__.py is empty."""
    found = {module_of(path): path.read_text(encoding="utf-8") for path in files(".py")}
    folders = {name.rpartition(".")[0] for name in found} - found.keys()
    return dict.fromkeys(folders, "") | found


def is_module_or_part(name: str, known: dict[str, str]) -> bool:
    """Whether it is a module, or something that the nearest module around it defines or imports."""
    parts = name.split(".")
    around = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), 0)
    rest = parts[around:]
    return not rest or (around > 0 and re.search(rf"\b{rest[0]}\b", known[".".join(parts[:around])]) is not None)


def test_files_that_are_named_exist() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {mention}"
        for path, text in texts()
        for mention in FILE.findall(TREE.sub("", text) if path.suffix == ".md" else text)
        if not is_there(mention, path)
    ]
    assert not wrong


def test_dotted_names_exist() -> None:
    known = modules()
    read = [*texts(), *((path, strings(path)) for path in files(".py") if path.relative_to(ROOT).parts[0] != "tests")]
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, text in read
        for name in DOTTED.findall(text)
        if not is_module_or_part(name, known)
    ]
    assert not wrong


def test_a_name_of_something_that_is_gone_is_found() -> None:
    known = modules()
    assert is_module_or_part("stepvideo_serve.serving.rank_factory.build_rank", known)
    assert is_module_or_part("export.goldens", known)
    assert not is_module_or_part("stepvideo_serve.tritonserver", known)
    assert not is_module_or_part("stepvideo_serve.launch.server.launcher_of_old", known)
    here = ROOT / "stepvideo_serve" / "planning" / "quote.py"
    assert is_there("cost.py", here)
    assert is_there("dit/sharding.py", here)
    assert not is_there("parallel/cost.py", here)
