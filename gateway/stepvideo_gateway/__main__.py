"""python -m stepvideo_gateway [--config gateway.toml]            serves until it is told to stop
python -m stepvideo_gateway [--config gateway.toml] keys add NAME  makes an API key
python -m stepvideo_gateway [--config gateway.toml] migrate        brings the database to the newest form
"""

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvicorn
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from stepvideo_gateway.api import create_app
from stepvideo_gateway.config import GatewayConfig
from stepvideo_gateway.database import engine_for, migrate
from stepvideo_gateway.errors import ApiError, ConfigError
from stepvideo_gateway.keys import Keys
from stepvideo_gateway.logs import configure
from stepvideo_gateway.pages import Example

EXIT_CONFIG = 2
STOP_S = 10  # how long requests under way have to end when the gateway stops


class AnnouncingServer(uvicorn.Server):
    """Says where it listens, once it does: the port may have been any free one."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for address in [each.getsockname() for server in self.servers for each in server.sockets]:
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            print(f"gateway: http://{host}:{address[1]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 where the configuration or the database cannot be used."""
    args = _parser().parse_args(arguments)
    try:
        config = (GatewayConfig.load(args.config) if args.config else GatewayConfig()).in_environment(os.environ)
        if args.server:
            config = replace(config, servers=replace(config.servers, urls=tuple(args.server)))
        configure(config.logging.format)
        if args.command == "keys":
            asyncio.run(_keys(config, args))
            return 0
        asyncio.run(migrate(config.jobs.database))
        if args.command == "migrate":
            return 0
        example = Example(Path(args.example[0]), args.example[1]) if args.example else None
        if example is not None:
            example.check()
        return _serve(config, example)
    except (ConfigError, ApiError) as error:
        print(f"stepvideo-gateway: {error}", file=sys.stderr)
    except (OSError, ImportError, SQLAlchemyError) as error:
        database = make_url(config.jobs.database).render_as_string(hide_password=True)
        print(
            f"stepvideo-gateway: The database must be usable, {database} is not: {getattr(error, 'orig', error)}",
            file=sys.stderr,
        )
    return EXIT_CONFIG


def _serve(config: GatewayConfig, example: Example | None) -> int:
    config.servers.check_files()
    app = create_app(config, example)
    app.state.gateway.store.prepare()
    listen = config.listen
    server = AnnouncingServer(
        uvicorn.Config(
            app,
            host=listen.address,
            port=listen.port,
            timeout_graceful_shutdown=STOP_S,
            access_log=False,
            log_config=None,
            server_header=False,
        )
    )
    try:
        server.run()
    except SystemExit:
        logging.getLogger(__name__).error("the gateway could not listen on %s:%d", listen.address, listen.port)
        return 1
    return 0 if server.started else 1


async def _keys(config: GatewayConfig, args: argparse.Namespace) -> None:
    await migrate(config.jobs.database)
    engine = engine_for(config.jobs.database)
    keys = Keys(engine)
    try:
        if args.action == "add":
            presets = [name for name in args.presets.split(",") if name]
            names = ("max_active", "max_running", "max_per_day", "max_pixels")
            limits = {name: getattr(args, name) for name in names}
            print(await keys.add(args.name, presets=presets, **limits))
        elif args.action == "remove":
            if not await keys.remove(args.name):
                raise ConfigError(f"There is no key {args.name!r}: see `python -m stepvideo_gateway keys list`.")
        else:
            for key in await keys.all():
                allowed = ",".join(key.presets) or "all"
                bounds = f"active {key.max_active}\trunning {key.max_running}\tday {key.max_per_day}"
                print(f"{key.name}\t{bounds}\tpixels {key.max_pixels}\t{allowed}")
    finally:
        await engine.dispose()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepvideo-gateway", description="The OpenAI Videos API for stepvideo-serve.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="gateway.toml; without one, all is as by default")
    parser.add_argument("--server", action="append", metavar="HOST:PORT", help="in place of [servers] urls; repeatable")
    shown = ("PICTURE", "PROMPT")
    parser.add_argument("--example", nargs=2, metavar=shown, help="what the form of the web page begins with")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("serve", help="serve until told to stop (what happens without a command, too)")
    commands.add_parser("migrate", help="bring the database to the newest form; serving does that by itself")
    actions = commands.add_parser("keys", help="API keys").add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="make a key; it is shown this once")
    add.add_argument("name", metavar="NAME", help="whose key it is")
    for flag, what in (
        ("--max-active", "videos that may wait or run at the same time"),
        ("--max-running", "videos that servers may have at the same time; more wait"),
        ("--max-per-day", "videos in 24 hours"),
        ("--max-pixels", "frames x height x width of one video"),
    ):
        add.add_argument(flag, type=int, default=0, metavar="N", help=f"{what}; 0: any number")
    add.add_argument("--presets", default="", metavar="A,B", help="values of quality that are allowed; none: all")
    remove = actions.add_parser("remove", help="make a key unknown; its videos stay until they expire")
    remove.add_argument("name", metavar="NAME")
    actions.add_parser("list", help="names and limits")
    return parser


if __name__ == "__main__":
    sys.exit(main())
