"""Writes what follows from the table of fields (`make fields`), or says what is stale (`make lint`).

    python -m stepvideo_serve.serving.field_files [--root .] [--check]

model_repository/{ti2v,ti2v_unary,ti2v_quote}/config.pbtxt   the block of inputs
client/stepvideo_client/fields.py                            the whole file: options and command line of the client
docs/requests.md                                             the table between the markers

Values in the documents are those of a server without [limits] and [defaults].
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from stepvideo_serve.errors import ConfigError, SetupError
from stepvideo_serve.request.field import Default, Field, Need
from stepvideo_serve.request.fields import FIELDS, fields_for
from stepvideo_serve.request.limits import RequestDefaults, RequestLimits
from stepvideo_serve.request.rules import Choice, Multiple, Noise, Quality, exact

SOURCE = "stepvideo_serve/request/fields.py"
WRITTEN = f"written by `make fields` from {SOURCE}"
CLIENT_FILE = "client/stepvideo_client/fields.py"
DOCUMENT = "docs/requests.md"
TABLE_BEGINS = f"<!-- fields: {WRITTEN} -->"
TABLE_ENDS = "<!-- fields end -->"
LINE = 120  # as ruff formats
WIDTH = LINE - 4

_OF_PYTHON = {"BYTES": "str", "INT32": "int", "INT64": "int", "FP32": "float"}
_CLIENT_HEAD = f'''"""The inputs of the server's models: {WRITTEN}.

What a caller does not give (or gives as None) is not sent, and the server decides: `Client.defaults` asks how.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

Command = Literal["generate", "quote"]


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: its name and datatype on the wire, and how many dimensions it has; the commands that take it; on the
    command line its flag (none without), what stands for its value, the words to choose from, and its help."""

    name: str
    datatype: str
    dimensions: int
    commands: tuple[Command, ...]
    flag: str
    metavar: str
    choices: tuple[str, ...] = ()
    required: bool = False
    help: str
'''


def generated(root: Path) -> dict[Path, str]:
    """Path -> text of every file that follows from the table. Raises ConfigError for one without a place for that."""
    edits: dict[str, Callable[[str], str]] = {
        "model_repository/ti2v/config.pbtxt": partial(with_inputs, fields=fields_for("request")),
        "model_repository/ti2v_unary/config.pbtxt": partial(with_inputs, fields=fields_for("request")),
        "model_repository/ti2v_quote/config.pbtxt": partial(with_inputs, fields=fields_for("quote")),
        DOCUMENT: partial(with_table, fields=FIELDS),
    }
    texts = {root / CLIENT_FILE: client_module(FIELDS)}
    for name, edit in edits.items():
        try:
            texts[root / name] = edit((root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{root / name} must have a place for what {SOURCE} says: {error}.") from error
    return texts


def with_inputs(text: str, fields: Iterable[Field]) -> str:
    """A config.pbtxt with its block of inputs replaced. ValueError without one."""
    entries = ",\n".join(f"  {_pbtxt_entry(field)}" for field in fields)
    block = f"input [  # {WRITTEN}\n{entries}\n]"
    return _replaced(r"^input \[.*?^\]", block, text, "a block `input [ ... ]`")


def with_table(text: str, fields: Iterable[Field]) -> str:
    """A document with the table between the markers replaced. ValueError without them."""
    pattern = rf"^<!-- fields: .*?^{re.escape(TABLE_ENDS)}$"
    return _replaced(pattern, f"{TABLE_BEGINS}\n{document_table(fields)}\n{TABLE_ENDS}", text, TABLE_BEGINS)


def document_table(fields: Iterable[Field]) -> str:
    """A Markdown table: input, type, models, default, rule and meaning."""
    rows = ["| input | type | of | default | accepted | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for field in fields:
        cells = (field.name, _type(field), _models(field), _default(field), field.rule.words(RequestLimits()))
        rows.append(f"| {' | '.join(cells)} | {field.help} |")
    return "\n".join(rows)


def client_module(fields: Sequence[Field]) -> str:
    """The text of client/stepvideo_client/fields.py."""
    options = [field for field in fields if "request" in field.needs and field.default is not Default.REQUIRED]
    parts = [
        _CLIENT_HEAD,
        _typed_dict("Options", "Client.generate", options),
        _typed_dict("QuoteOptions", "Client.quote", [field for field in fields if "quote" in field.needs]),
        "INPUTS: Final[dict[str, Input]] = {\n" + "".join(map(_client_entry, fields)) + "}\n",
    ]
    return "\n\n".join(parts)


def _replaced(pattern: str, block: str, text: str, what: str) -> str:
    found, count = re.subn(pattern, lambda _: block, text, count=1, flags=re.MULTILINE | re.DOTALL)
    if not count:
        raise ValueError(f"{what} is missing")
    return found


def _pbtxt_entry(field: Field) -> str:
    kind = "TYPE_STRING" if field.dtype == "BYTES" else f"TYPE_{field.dtype}"
    dims = ", ".join(["-1"] * 4 if isinstance(field.rule, Noise) else ["1"])
    optional = "" if field.default is Default.REQUIRED else " optional: true"
    return f'{{ name: "{field.name}" data_type: {kind} dims: [ {dims} ]{optional} }}'


def _type(field: Field) -> str:
    return field.dtype if isinstance(field.rule, Noise) else f"{field.dtype} [1]"


def _models(field: Field) -> str:
    names: dict[Need, str] = {"request": "ti2v", "quote": "quote"}
    return ", ".join(name for need, name in names.items() if need in field.needs)


def _default(field: Field) -> str:
    if isinstance(field.default, Default) and field.default is not Default.CONFIGURED:
        return str(field.default.value)
    value = field.default_in(RequestDefaults())
    if value is None:
        return "none"
    if isinstance(value, str):
        return value if isinstance(field.rule, Choice | Quality) else "the official text"
    return f"{exact(value)}, or `[defaults]`" if field.default is Default.CONFIGURED else exact(value)


def _client_default(field: Field) -> str:
    """What follows the help of an option: "(2)"; nothing where the help says it all."""
    if field.default is Default.CONFIGURED:
        return " (the server's default)"
    return "" if field.default in (None, Default.REQUIRED) else f" ({_default(field)})"


def _client_help(field: Field) -> str:
    grid = f", a multiple of {field.rule.step}" if isinstance(field.rule, Multiple) else ""
    return f"{field.help}{grid}{_client_default(field)}"


def _typed_dict(name: str, method: str, fields: Sequence[Field]) -> str:
    lines = [f"class {name}(TypedDict, total=False):", f'    """Keyword arguments of {method}.', ""]
    for field in fields:
        shape = f" float32 {field.rule.words(RequestLimits())};" if isinstance(field.rule, Noise) else ""
        text = f"{field.attribute}:{shape} {_client_help(field)}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
    lines += ['    """', ""]
    for field in fields:
        kind = "NDArray[np.float32]" if isinstance(field.rule, Noise) else _OF_PYTHON[field.dtype]
        lines.append(f"    {field.attribute}: {kind} | None")
    return "\n".join(lines) + "\n"


def _client_entry(field: Field) -> str:
    commands = [name for need, name in (("request", "generate"), ("quote", "quote")) if need in field.needs]
    choices = field.rule.options if isinstance(field.rule, Choice) else ()
    arguments = {
        "name": _quoted(field.name),
        "datatype": _quoted(field.dtype),
        "dimensions": "4" if isinstance(field.rule, Noise) else "1",
        "commands": _tuple(commands),
        "flag": _quoted(field.option if "client" in field.needs else ""),
        "metavar": _quoted(field.metavar),
        **({"choices": _tuple(choices)} if choices else {}),
        **({"required": "True"} if field.default is Default.REQUIRED else {}),
        "help": _wrapped(_client_help(field)),
    }
    lines = "".join(f"        {name}={value},\n" for name, value in arguments.items())
    return f"    {_quoted(field.attribute)}: Input(\n{lines}    ),\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _tuple(items: Sequence[str]) -> str:
    words = ", ".join(map(_quoted, items))
    return f"({words},)" if len(items) == 1 else f"({words})"


def _wrapped(text: str) -> str:
    """A literal behind `help=`, of several lines where one is too long."""
    literal = _quoted(text)
    if len(f"        help={literal},") <= LINE:
        return literal
    alone = len(f"            {literal}") <= LINE
    lines = [text] if alone else textwrap.wrap(text, WIDTH - 16, drop_whitespace=False)
    return "\n".join(["(", *(f"            {_quoted(line)}" for line in lines), "        )"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files, or with --check names the stale ones and returns 1."""
    parser = argparse.ArgumentParser(prog="field_files", description="What follows from the table of fields.")
    parser.add_argument("--root", type=Path, default=Path(), help="the top of the checkout (here)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    options = parser.parse_args(arguments)
    try:
        texts = generated(options.root)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if options.check:
        if stale:
            names = ", ".join(str(path) for path in stale)
            print(f"{names} must be as {SOURCE} says, and is not: run make fields.", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
