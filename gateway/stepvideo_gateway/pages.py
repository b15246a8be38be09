"""The web page: the files in `web/`, and what the page has to know before it can ask for a video."""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from stepvideo_client import MOVEMENTS
from stepvideo_gateway import __version__
from stepvideo_gateway.body import fields_of
from stepvideo_gateway.errors import ConfigError
from stepvideo_gateway.fields import FIELDS, FPS, FRAMES_PER_UNIT, PIXELS_PER_UNIT
from stepvideo_gateway.service import Gateway

FOLDER: Final = Path(__file__).parent / "web"
INDEX: Final = "index.html"
EXAMPLE: Final = "example"
ASSETS_AT: Final = "ASSETS"  # in index.html, the folder in which the page finds its files
KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}
FOR_EVER: Final = "public, max-age=31536000, immutable"
SAFE: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Example:
    """What the form begins with: the file of a picture, and a prompt."""

    picture: Path
    prompt: str

    def check(self) -> None:
        """Raises ConfigError for a picture that is not there, or of a kind that browsers do not show."""
        if not self.picture.is_file() or not KINDS.get(self.picture.suffix, "").startswith("image/"):
            raise ConfigError(f"--example needs a PNG, JPEG or WebP file, {self.picture} is none: name another one.")


@dataclass(frozen=True)
class Asset:
    """A file as it is sent: whole and compressed."""

    content: bytes
    packed: bytes
    kind: str

    @cached_property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


class Pages:
    """The page's files, read once. Assets have a folder whose name changes with their content, so that browsers may
    keep them for ever and a new gateway's page is never mixed from two."""

    def __init__(self, example: Example | None = None, folder: Path = FOLDER) -> None:
        self._example = example
        paths = sorted(path for path in folder.iterdir() if path.suffix in KINDS)
        contents = {path.name: path.read_bytes() for path in paths}
        self.digest = hashlib.sha256(b"\0".join(contents.values())).hexdigest()[:16]
        contents[INDEX] = contents[INDEX].replace(ASSETS_AT.encode(), f"web/{self.digest}".encode())
        self.assets = {
            name: Asset(content, gzip.compress(content, mtime=0), KINDS[Path(name).suffix])
            for name, content in contents.items()
        }

    def add_to(self, app: FastAPI, gateway: Gateway) -> None:
        """The page at /, its files below /web, and what its form has to know at /v1/about."""

        @app.get("/v1/about", summary="What may be asked for: fields, movements, a server's defaults and limits")
        async def about(request: Request) -> Response:
            await gateway.holder(request.headers.get("authorization"))
            return JSONResponse(self.about(gateway.config.api.model, await gateway.offer()))

        @app.post(
            "/v1/quotes/presets", summary="What a video would take with each preset; fields as in POST /v1/videos"
        )
        async def quotes(request: Request) -> Response:
            await gateway.holder(request.headers.get("authorization"))
            given = await fields_of(request, gateway.config.api)
            return JSONResponse({"object": "quotes", "presets": await gateway.quotes(given)})

        @app.get("/", include_in_schema=False)
        async def index(request: Request) -> Response:
            return _sent(self.assets[INDEX], request, "no-cache")

        @app.get("/web/{digest}/{name}", include_in_schema=False)
        async def asset(digest: str, name: str, request: Request) -> Response:
            if digest != self.digest or name not in self.assets or name == INDEX:
                raise HTTPException(404, "There is no such file of the page: load the page again.")
            return _sent(self.assets[name], request, FOR_EVER)

        @app.get(f"/web/{EXAMPLE}", include_in_schema=False)
        async def example() -> Response:
            if self._example is None:
                raise HTTPException(404, "There is no example: the gateway was started without --example.")
            content = self._example.picture.read_bytes()
            return Response(content, media_type=KINDS[self._example.picture.suffix], headers=SAFE)

    def about(self, model: str, offer: dict[str, Any] | None) -> dict[str, Any]:
        """What the form needs. `offer`: what a server accepts; None while no server tells."""
        example = None if self._example is None else {"prompt": self._example.prompt, "picture": f"/web/{EXAMPLE}"}
        return {
            "version": __version__,
            "model": model,
            "fields": list(FIELDS),
            "cameras": dict(MOVEMENTS),
            "fps": FPS,
            "frames_per_unit": FRAMES_PER_UNIT,
            "pixels_per_unit": PIXELS_PER_UNIT,
            "server": offer,
            "example": example,
        }


def _sent(asset: Asset, request: Request, keep: str) -> Response:
    headers = {**SAFE, "etag": asset.etag, "cache-control": keep, "vary": "accept-encoding"}
    if asset.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(asset.packed, media_type=asset.kind, headers={**headers, "content-encoding": "gzip"})
    return Response(asset.content, media_type=asset.kind, headers=headers)
