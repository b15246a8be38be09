import ast
import importlib
import sys
import tomllib
from pathlib import Path


def test_the_console_script_has_a_target(root: Path) -> None:
    project = tomllib.loads((root / "client" / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["stepvideo"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_it_imports_only_what_it_depends_on(root: Path) -> None:
    allowed = {
        "stepvideo_client",
        "numpy",
        "tritonclient",
        "grpc",
    } | sys.stdlib_module_names  # grpc: tritonclient[grpc]
    files = sorted((root / "client" / "stepvideo_client").glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules.append(node.module or "")
            assert {module.split(".")[0] for module in modules} <= allowed, path.name
