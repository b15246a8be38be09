"""The one command of the package: python -m stepvideo_serve COMMAND [options].

A command's module is imported when the command is asked for, so that a probe need not import torch.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {
    "serve": ("launch.server", "serve_main", "run the server until Ctrl-C or SIGTERM"),
    "run": ("launch.server", "run_main", "run the server as long as a command runs"),
    "supervise": ("launch.supervise", "main", "run the server, and revive what dies"),
    "health": ("launch.health", "main", "ask a running server whether it is well"),
    "generate": ("assembly.generate_command", "main", "make one video in this process, without a server"),
    "doctor": ("doctor.command", "main", "look at all that a server needs, before a start"),
    "layouts": ("planning.layouts", "main", "predict what each layout of N GPUs takes"),
}
"""Command -> module below stepvideo_serve, function, and what the command does."""


def usage() -> str:
    """What `--help` prints."""
    rows = [f"  {name:<10} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(["usage: python -m stepvideo_serve COMMAND [options]", "", *rows, "", "COMMAND --help says more."])


def main(argv: Sequence[str]) -> int:
    """The command's exit code; 2 when there is no such command."""
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not argv or argv[0] not in COMMANDS:
        got = repr(argv[0]) if argv else "none"
        print(f"error: The command must be one of {', '.join(COMMANDS)}, got {got}: see --help.", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[argv[0]]
    command: Callable[[Sequence[str]], int] = getattr(import_module(f"stepvideo_serve.{module}"), function)
    return command(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
