"""What every request passes: the limit of its size, the token, and how it is told what is wrong. `app`: the application."""

import hmac
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from serving import openai
from serving.openai import Refused

TOKEN = "GEODISTILL_API_TOKEN"
PAGE = Path(__file__).parent / "web"


class Limit:
    """ASGI: answer 413 to a body that is longer than `most` bytes (of a scene `most_of_scene`), before it is read; 400 where it
    does not say its length."""

    most = 2**25
    most_of_scene = 2**30
    needs_token = False

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most = self.most_of_scene if scope["path"].endswith("/v1/scenes") else self.most
        too_long = Refused(413, f"the body is longer than {most / 2**20:g} MiB")
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            return await refuse(too_long)(scope, receive, send)
        read = 0

        async def counted() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise too_long
            return message

        await self.app(scope, counted, send)


def refuse(refused: Refused) -> JSONResponse:
    """The answer to a request that is refused."""
    headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after else None
    return JSONResponse(openai.error(refused.message, refused.status, refused.field), refused.status, headers)


app = FastAPI(title="GeoDistill", description="Questions on remote-sensing images", version="1", docs_url="/docs", redoc_url=None)
app.add_middleware(Limit)
app.mount("/web", StaticFiles(directory=PAGE), name="web")


@app.exception_handler(Refused)
async def _refused(_: Request, refused: Refused) -> Response:
    return refuse(refused)


@app.exception_handler(HTTPException)
async def _http(_: Request, error: HTTPException) -> Response:
    answer = refuse(Refused(error.status_code, str(error.detail)))
    answer.headers.update(error.headers or {})
    return answer


@app.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    return refuse(Refused(400, f"{field or 'body'}: {first['msg']}", field or None))


async def authorised(request: Request) -> None:
    """Raise Refused where a token is asked for and the request does not bring it."""
    token = os.environ.get(TOKEN)
    if Limit.needs_token and not token:
        raise Refused(503, f"{TOKEN} was set where this was started, but not for Ray's processes: nobody is let in")
    given = request.headers.get("authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refused(401, "this endpoint needs a token: send the header Authorization: Bearer TOKEN")


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "the request says something that cannot be served; the message names the field",
        401: "the token is missing or wrong",
        404: "there is no such model",
        413: "the body is too long",
        429: "too many requests wait; Retry-After says when to come again",
        503: "no replica answered",
        504: "the answer took too long",
    }.items()
}
