"""How long a server has had nothing to do."""

import time

from stepvideo_client import Client, ClientError


class IdleClock:
    """Asks a server whenever it is read; a server that does not tell is busy."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._busy_s = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since the last reading at which a new request would not have begun at once."""
        try:
            with Client(self._url) as client:
                waits = client.quote(output="latents").queue_wait_s > 0
        except ClientError:
            waits = True
        if waits:
            self._busy_s = time.monotonic()
        return time.monotonic() - self._busy_s
