"""The body of a request -> its fields: multipart, form or JSON, within its bounds of size and time."""

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from stepvideo_gateway.config import Api
from stepvideo_gateway.errors import BadRequest, TooLarge, TooSlow
from stepvideo_gateway.fields import REFERENCE

MAX_FIELDS = 64


async def fields_of(request: Request, limits: Api) -> dict[str, Any]:
    """Fields by name; the picture as bytes or text. Raises BadRequest, TooLarge and TooSlow."""
    content = _Bounded(request, limits.max_upload_mib << 20)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
            if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
                return await _form(content.request, limits)
            return _json(await content.request.body())
    except TimeoutError:
        raise TooSlow(f"The request's body must arrive within {limits.body_timeout_s:g} s, it did not.") from None


class _Bounded:
    """The request with a body that is cut off, with TooLarge, beyond so many bytes."""

    def __init__(self, request: Request, most: int) -> None:
        self._receive, self._most, self._had = request.receive, most, 0
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise self._too_large()
        self.request = Request(request.scope, self._next)

    async def _next(self) -> Any:
        message = await self._receive()
        self._had += len(message.get("body", b""))
        if self._had > self._most:
            raise self._too_large()
        return message

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The request must have at most {self._most >> 20} MiB, it has more: send a smaller picture.")


async def _form(request: Request, limits: Api) -> dict[str, Any]:
    try:
        async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=limits.max_upload_mib << 20) as form:
            fields: dict[str, Any] = {}
            for name, value in form.multi_items():
                name = REFERENCE if name in (f"{REFERENCE}[image_url]", f"{REFERENCE}[file_id]") else name
                if name in fields:
                    raise BadRequest(f"The field {name!r} came twice: send it once.", name)
                fields[name] = await value.read() if isinstance(value, UploadFile) else value
            return fields
    except (MultiPartException, HTTPException) as error:
        said = getattr(error, "message", None) or getattr(error, "detail", "")
        raise BadRequest(f"The form cannot be read: {said}") from None


def _json(body: bytes) -> dict[str, Any]:
    try:
        read = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise BadRequest("The body must be a form or a JSON object, got neither.") from None
    if not isinstance(read, dict):
        raise BadRequest(f"The body must be a JSON object, got {type(read).__name__}.")
    reference = read.get(REFERENCE)
    if isinstance(reference, dict) and isinstance(reference.get("image_url"), str):
        return {**read, REFERENCE: reference["image_url"]}
    return read
