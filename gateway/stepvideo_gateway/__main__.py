"""python -m stepvideo_gateway [--config gateway.toml]: serves until it is told to stop."""

import argparse
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from stepvideo_gateway.api import create_app
from stepvideo_gateway.config import GatewayConfig
from stepvideo_gateway.errors import ApiError, ConfigError

EXIT_CONFIG = 2
STOP_S = 10  # that requests under way have when the gateway stops


class AnnouncingServer(uvicorn.Server):
    """Says where it listens, once it does: the port may have been any free one."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for address in [each.getsockname() for server in self.servers for each in server.sockets]:
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            print(f"gateway: http://{host}:{address[1]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves; the exit code."""
    parser = argparse.ArgumentParser(prog="stepvideo-gateway", description="The OpenAI Videos API for stepvideo-serve.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="gateway.toml; without one, all is as by default")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        config = GatewayConfig.load(args.config) if args.config else GatewayConfig()
        app = create_app(config)
        app.state.gateway.store.prepare()
    except (ConfigError, ApiError) as error:
        print(f"stepvideo-gateway: {error}", file=sys.stderr)
        return EXIT_CONFIG
    server = AnnouncingServer(
        uvicorn.Config(
            app,
            host=config.listen.address,
            port=config.listen.port,
            timeout_graceful_shutdown=STOP_S,
            access_log=False,
            log_config=None,
            server_header=False,
        )
    )
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
