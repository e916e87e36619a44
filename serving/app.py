"""The Ray Serve application: an endpoint like OpenAI's for a distilled student, and a page to try it.

    serve run serving.app:build student=runs/demo/distill/model

`Api` checks what comes in, decodes the image and asks `Model`, again on another replica where one was lost; a model has its own
replicas. Settings are the fields of `Settings`; a token that every request must bring is GEODISTILL_API_TOKEN in the environment.
"""

import asyncio
import hmac
import logging
import math
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from rasterio.errors import RasterioError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from geodistill.cluster import ENVIRONMENT
from geodistill.data.imagery import DRIVERS
from geodistill.data.record import BadRecord, check_text
from geodistill.data.scenes import Found, Scene, Tile, found_in, merged, open_scene, tiles
from geodistill.language import GROUNDING
from serving import openai
from serving.model import Asked, Model, Said, new_seed
from serving.openai import ChatRequest, Refused
from serving.pictures import preview_of, sample_scenes, see, see_tile

TOKEN = "GEODISTILL_API_TOKEN"
BUSY = "too many requests wait for this model; try again in a second"
QUIET = {"enable_access_log": False}  # a line a request costs more than many an answer; Prometheus has the figures
TRIES = 6  # replicas that a request is sent to before it is given up


class ReplicaLost(Exception):
    """The model of a replica stopped."""


LOST = (RayActorError, DeploymentUnavailableError, ReplicaLost)
PAGE = Path(__file__).parent / "web"
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
logger = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """What `serve run serving.app:build KEY=VALUE ...` and args: in a Serve config take."""

    model_config = ConfigDict(extra="forbid")

    student: str = Field(description="folder of the student, as jobs/distill.py wrote it")
    teacher: str = Field("", description="folder of a teacher to be served beside it, for comparison")
    replicas: int = Field(1, ge=0, description="replicas of each model at least")
    max_replicas: int = Field(0, ge=0, description="and at most, as the queue asks for; 0: as many as at least")
    cpus: float = Field(0.5, gt=0, description="CPUs of a replica [Ray's accounting]")
    gpus: float = Field(0, ge=0, description="GPUs of a replica; 0: it runs on the CPU")
    threads: int = Field(1, ge=1, description="threads of a replica on the CPU")
    batch: int = Field(32, ge=1, description="requests that a replica answers together")
    queue: int = Field(64, ge=0, description="requests that may wait; more get 429 with Retry-After")
    timeout: float = Field(60, gt=0, description="seconds that an answer may take, else 504")
    max_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    max_body_mb: float = Field(32, gt=0, description="size of a request [MiB]")
    max_scene_mb: float = Field(1024, gt=0, description="size of a whole scene [MiB]")
    max_tiles: int = Field(50_000, ge=1, description="of a scene")
    needs_token: bool = Field(False, description="set by itself where GEODISTILL_API_TOKEN is")
    max_pixels: int = Field(50_000_000, ge=1, description="of an image, before it is decoded")
    image_hosts: list[str] = Field(
        [], description="hosts (host or host:port) that image_url may name by http(s); none: data URLs alone"
    )
    prefix_mb: int = Field(1024, ge=0, description="memory of a replica for images that were asked about before [MiB]")
    angle_counter_clockwise: bool = Field(True, description="sign of theta in the box text")


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


def _checked(said: Said) -> Said:
    if said.status == 503:
        raise ReplicaLost(said.text)
    if said.status != 200:
        raise Refused(said.status, said.text, retry_after=1 if said.status == 429 else None)
    return said


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


@serve.deployment(
    max_ongoing_requests=4096,
    logging_config=QUIET,
    ray_actor_options={"num_cpus": 0.25, "runtime_env": {"env_vars": ENVIRONMENT}},
)
@serve.ingress(app)
class Api:
    """What clients talk to. models: a handle of each model by its name."""

    def __init__(self, settings: Settings, models: dict[str, DeploymentHandle]):
        self.settings, self.models = settings, models
        Limit.needs_token = settings.needs_token
        Limit.most, Limit.most_of_scene = (int(limit * 2**20) for limit in (settings.max_body_mb, settings.max_scene_mb))
        self.sizes: dict[str, int] = {}
        self.asks = asyncio.Lock()
        self.began = int(time.time())

    @app.get("/health", tags=["state"])
    async def health(self) -> dict:
        """This process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["state"], responses={503: ERRORS[503]})
    async def ready(self) -> dict:
        """Every model answers."""
        for name in self.models:
            try:
                await self._size(name, again=True)
            except Refused as refused:
                if refused.status != 429:  # busy is ready
                    raise
        return {"status": "ready", "models": [*self.models]}

    @app.get("/v1/models", tags=["openai"], dependencies=[Depends(authorised)], responses={401: ERRORS[401]})
    async def list_models(self) -> dict:
        """The models that are served."""
        found = [{"id": name, "object": "model", "created": self.began, "owned_by": "geodistill"} for name in self.models]
        return {"object": "list", "data": found}

    @app.post("/v1/chat/completions", tags=["openai"], dependencies=[Depends(authorised)], responses=ERRORS)
    async def chat(self, request: ChatRequest) -> Any:
        """Answer a question on an image; with stream=true as server-sent events."""
        self._need(request.model)
        turns, url = openai.conversation(request)
        data = openai.data_url(url)
        image = await self._fetch(url) if data is None else data
        size = self.sizes.get(request.model) or await self._size(request.model)
        arguments = image, size, self.settings.max_pixels
        pixels, width, height = await asyncio.get_running_loop().run_in_executor(None, see, *arguments)
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        asked = Asked(
            turns, pixels, request.max_completion_tokens or request.max_tokens, request.temperature or 0.0,
            request.top_p or 1.0, new_seed() if request.seed is None else request.seed % 2**63, stop, self.settings.timeout,
        )  # fmt: skip
        question = turns[-1][0]
        if request.stream:
            growing = self._grow(request.model, asked)
            first = await anext(growing)  # what is refused is refused with its status, before the answer begins
            return StreamingResponse(
                self._events(request, first, growing, question, (width, height)), media_type="text/event-stream"
            )
        said = await self._ask(request.model, asked)
        boxes = openai.boxes_of(said.text, question, width, height, self.settings.angle_counter_clockwise)
        tokens = openai.usage(said.prompt, said.tokens)
        return JSONResponse(openai.completion(openai.new_id(), request.model, said.text, boxes, said.reason or "stop", tokens))

    @app.post("/v1/scenes", tags=["scenes"], dependencies=[Depends(authorised)], responses=ERRORS)
    async def scenes(
        self,
        request: Request,
        model: str = "student",
        question: str = f"{GROUNDING} describe the image in detail.",
        tile: Annotated[int, Query(ge=0, le=8192)] = 0,
        overlap: Annotated[int, Query(ge=-1, le=8192)] = -1,
        iou: Annotated[float, Query(gt=0, le=1)] = 0.3,
        geographic: bool = True,
    ) -> Any:
        """Look at a whole GeoTIFF, the body of the request, tile by tile: what was found, as GeoJSON in longitude and latitude
        (geographic=false: in the scene's own coordinates). tile, overlap: pixels; 0, -1: what the model sees, and a quarter."""
        self._need(model, question)
        size = await self._size(model)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "scene"
            with file.open("wb") as out:
                async for piece in request.stream():
                    out.write(piece)
            try:
                with open_scene(str(file), drivers=DRIVERS) as scene:
                    side = tile or size
                    step = side - (side // 4 if overlap < 0 else overlap)
                    if step < 1:
                        raise Refused(400, f"overlap={overlap} must be smaller than a tile ({side} pixels)", "overlap")
                    if math.ceil(scene.width / step) * math.ceil(scene.height / step) > self.settings.max_tiles:
                        raise Refused(400, f"the scene has more than {self.settings.max_tiles} tiles of {side} pixels", "tile")
                    cut = tiles(scene.width, scene.height, side, side - step)
                    found = await self._look(model, scene, cut, question, size)
                    return JSONResponse(scene.geojson(merged(found, iou), geographic, model=model))
            except BadRecord as error:
                raise Refused(400, error.reason) from error
            except ValueError as error:
                raise Refused(400, str(error)) from error
            except ExceptionGroup as errors:  # of a tile
                first = errors.exceptions[0]
                if isinstance(first, (RasterioError, OSError)):
                    raise Refused(400, f"the scene cannot be read ({first})") from errors
                raise first from errors

    async def _look(self, model: str, scene: Scene, cut: list[Tile], question: str, size: int) -> list[Found]:
        """What a model finds in the tiles `cut` of a scene; so many of them at a time as a replica answers together."""
        loop, places = asyncio.get_running_loop(), asyncio.Semaphore(self.settings.batch)
        found: list[Found] = []

        async def look(tile: Tile, pixels: np.ndarray) -> None:
            try:
                asked = Asked([(question, None)], pixels, seconds=self.settings.timeout)
                said = await self._ask(model, asked, waits=True)
                ccw = self.settings.angle_counter_clockwise
                found.extend(found_in(tile, scene, question, said.text, said.score, ccw))
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            for tile in cut:
                await places.acquire()
                pixels = await loop.run_in_executor(None, see_tile, scene, tile, size)
                if pixels is None:
                    places.release()
                else:
                    group.create_task(look(tile, pixels))
        return found

    def _need(self, model: str, text: str = "?") -> None:
        if model not in self.models:
            raise Refused(404, f"model: {model!r} is none of {', '.join(self.models)}", "model")
        if reason := check_text(text):
            raise Refused(400, f"question: {reason}", "question")

    @app.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """The page."""
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})

    @app.get("/samples", include_in_schema=False)
    async def samples(self) -> list[dict]:
        """Names and addresses of the scenes that the page offers."""
        return [{"name": scene.name, "url": f"samples/{i}.png"} for i, (scene, _) in enumerate(sample_scenes())]

    @app.get("/samples/{number}.png", include_in_schema=False)
    async def sample(self, number: int) -> Response:
        """A sample scene."""
        if not 0 <= number < len(sample_scenes()):
            raise Refused(404, f"there is no sample {number}")
        return Response(sample_scenes()[number][1], media_type="image/png")

    @app.post("/preview", tags=["page"], dependencies=[Depends(authorised)], responses=ERRORS)
    async def preview(self, request: Request) -> Response:
        """What a browser can show of an image, a GeoTIFF for one: a PNG; x-width and x-height: the sides of the whole image."""
        data, width, height = await asyncio.get_running_loop().run_in_executor(
            None, preview_of, await request.body(), self.settings.max_pixels
        )
        return Response(data, media_type="image/png", headers={"x-width": str(width), "x-height": str(height)})

    async def _size(self, name: str, again: bool = False) -> int:
        async with self.asks:  # once, however many requests come first
            if again or name not in self.sizes:
                try:
                    self.sizes[name] = (await asyncio.wait_for(self.models[name].about.remote(), 10))["size"]
                except BackPressureError as error:
                    raise Refused(429, BUSY, retry_after=1) from error
                except (TimeoutError, *LOST) as error:
                    raise Refused(503, f"{name} does not answer yet", retry_after=2) from error
        return self.sizes[name]

    async def _ask(self, name: str, asked: Asked, waits: bool = False) -> Said:
        """The answer of a model, asked again where a replica is lost; waits: and where too many wait. Raises Refused."""
        end = time.monotonic() + asked.seconds
        attempt = 0
        while attempt < TRIES:
            try:
                said = await asyncio.wait_for(self.models[name].answer.remote(asked), max(end - time.monotonic(), 0.01))
                return _checked(said)
            except LOST as error:
                await self._again(name, attempt, error)
                attempt += 1
            except BackPressureError as error:
                if not waits or time.monotonic() > end:
                    raise Refused(429, BUSY, retry_after=1) from error
                await asyncio.sleep(0.2)
            except TimeoutError as error:
                raise Refused(504, f"the answer took longer than {asked.seconds:g} s") from error
        raise Refused(503, f"{name} lost its replicas {TRIES} times while it answered", retry_after=5)

    async def _grow(self, name: str, asked: Asked) -> AsyncIterator[Said]:
        """The answer as it grows. Where a replica is lost another one begins anew, which writes the same: nothing is said twice,
        and what a client has got already stands. Raises Refused, before the first words or after."""
        shown, end = "", time.monotonic() + asked.seconds
        for attempt in range(TRIES):
            try:
                growing: Any = self.models[name].options(stream=True).stream.remote(asked)
                pieces = aiter(growing)
                while True:
                    try:
                        said = await asyncio.wait_for(anext(pieces), max(end - time.monotonic(), 0.01))
                    except StopAsyncIteration:
                        return
                    _checked(said)
                    if said.reason or len(said.text) > len(shown):
                        if not said.text.startswith(shown):
                            raise Refused(503, f"{name} lost a replica in the middle of an answer; ask again")
                        shown = said.text
                        yield said
            except LOST as error:
                await self._again(name, attempt, error)
            except BackPressureError as error:
                raise Refused(429, BUSY, retry_after=1) from error
            except TimeoutError as error:
                raise Refused(504, f"the answer took longer than {asked.seconds:g} s") from error
        raise Refused(503, f"{name} lost its replicas {TRIES} times while it answered", retry_after=5)

    async def _again(self, name: str, attempt: int, error: Exception) -> None:
        logger.warning("%s: a replica was lost (%s); the request is sent to another one", name, type(error).__name__)
        await asyncio.sleep(0.05 * 2**attempt)

    async def _events(
        self, request: ChatRequest, said: Said, growing: AsyncIterator[Said], question: str, sides: tuple[int, int]
    ) -> AsyncIterator[str]:
        name, created, shown = openai.new_id(), int(time.time()), ""
        yield openai.chunk(name, created, request.model, {"role": "assistant", "content": ""})
        try:
            while True:
                if said.text != shown:
                    yield openai.chunk(name, created, request.model, {"content": said.text[len(shown) :]})
                    shown = said.text
                if said.reason:
                    break
                said = await anext(growing)
        except Refused as refused:
            yield openai.event(openai.error(refused.message, refused.status))
            return
        boxes = openai.boxes_of(said.text, question, *sides, self.settings.angle_counter_clockwise)
        yield openai.chunk(name, created, request.model, {"boxes": boxes}, said.reason)
        if request.stream_options and request.stream_options.include_usage:
            usage = openai.usage(said.prompt, said.tokens)
            yield openai.chunk(name, created, request.model, {}, None, choices=[], usage=usage)
        yield "data: [DONE]\n\n"

    async def _fetch(self, url: str) -> bytes:
        """An image from a host that is allowed; no redirection is followed. Raises Refused."""
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise Refused(400, f"image_url: {error}", "image_url") from error
        if parts.scheme not in ("http", "https") or parts.netloc not in self.settings.image_hosts:
            raise Refused(400, "image_url: give the image as a data URL; this host is not one of image_hosts", "image_url")
        most = int(self.settings.max_body_mb * 2**20)
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
                session.get(url, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise Refused(400, f"image_url: {parts.netloc} answered {answer.status}", "image_url")
                found = await answer.content.read(most + 1)
                while len(found) <= most and (more := await answer.content.read(most + 1)):
                    found += more
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Refused(400, f"image_url: {parts.netloc} cannot be read ({type(error).__name__})", "image_url") from error
        if len(found) > most:
            raise Refused(400, f"image_url: the image is larger than {self.settings.max_body_mb:g} MiB", "image_url")
        return found


def models_of(settings: Settings, student: str = "student") -> dict[str, serve.Application]:
    """The deployments of the models by their names. Raises ValueError for a folder that holds none."""
    folders = {student: settings.student} | ({"teacher": settings.teacher} if settings.teacher else {})
    models = {}
    for name, folder in folders.items():
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"{name}={folder} holds no model (config.json is missing); run the job that writes it, or correct it"
            )
        deployment: Any = serve.deployment(
            Model,
            name=name,
            max_ongoing_requests=settings.batch + settings.batch // 2,  # the next ones are there when a place becomes free
            max_queued_requests=settings.queue,
            ray_actor_options={
                "num_cpus": settings.cpus,
                "num_gpus": settings.gpus,
                "runtime_env": {"env_vars": ENVIRONMENT},
            },
            autoscaling_config={
                "min_replicas": settings.replicas,
                "max_replicas": max(settings.max_replicas, settings.replicas, 1),
                "target_ongoing_requests": settings.batch,
                "upscale_delay_s": 5,
            },
            health_check_period_s=2,
            graceful_shutdown_timeout_s=settings.timeout,
            logging_config=QUIET,
        )
        sizes = settings.max_tokens, settings.batch, 2 * settings.batch, settings.prefix_mb
        models[name] = deployment.bind(str(Path(folder).resolve()), name, *sizes, settings.threads, settings.gpus > 0)
    return models


def build(settings: Settings) -> serve.Application:
    """The application of `Settings`. Raises ValueError for a folder that holds no model."""
    settings = settings.model_copy(update={"needs_token": settings.needs_token or bool(os.environ.get(TOKEN))})
    return Api.bind(settings, models_of(settings))  # type: ignore[attr-defined]
