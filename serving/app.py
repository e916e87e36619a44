"""The Ray Serve application: an endpoint like OpenAI's for a distilled student, and a page to try it.

    serve run serving.app:build student=runs/demo/distill/model

`Api` checks what comes in, decodes the image and asks `Model`, again on another replica where one was lost; a model has its own
replicas. Settings are the fields of `Settings`; a token that every request must bring is GEODISTILL_API_TOKEN in the environment.
"""

import asyncio
import math
import os
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
from fastapi import Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from rasterio.errors import RasterioError
from ray import serve
from ray.serve.handle import DeploymentHandle

from geodistill.cluster import ENVIRONMENT
from geodistill.data.files import absolute_path, local
from geodistill.data.imagery import DRIVERS
from geodistill.data.record import BadRecord, check_text
from geodistill.data.scenes import Found, Scene, Tile, found_in, merged, open_scene, tiles
from geodistill.data.stream import square
from geodistill.language import GROUNDING
from serving import openai
from serving.client import READY, Models, Show
from serving.gate import ERRORS, PAGE, TOKEN, Limit, app, authorised
from serving.model import Asked, Model, Said, new_seed
from serving.openai import ChatRequest, Refused
from serving.pictures import opened, preview_of, sample_scenes
from serving.settings import Settings

QUIET = {"enable_access_log": False}  # a line a request costs more than many an answer; Prometheus has the figures
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"


@serve.deployment(
    max_ongoing_requests=4096,
    max_surge_percent=100,
    logging_config=QUIET,
    ray_actor_options={"num_cpus": 0.25, "runtime_env": {"env_vars": ENVIRONMENT}},
)
@serve.ingress(app)
class Api:
    """What clients talk to. models: a handle of each model by its name."""

    def __init__(self, settings: Settings, models: dict[str, DeploymentHandle]):
        self.settings, self.models = settings, Models(models)
        Limit.needs_token = settings.needs_token
        Limit.most, Limit.most_of_scene = (int(limit * 2**20) for limit in (settings.max_body_mb, settings.max_scene_mb))
        self.began = int(time.time())

    @app.get("/health", tags=["state"])
    async def health(self) -> dict:
        """This process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["state"], responses={503: ERRORS[503]})
    async def ready(self) -> dict:
        """Every model answers."""
        for name in self.models.handles:
            try:
                await self.models.size(name, READY, again=True)
            except Refused as refused:
                if refused.status != 429:  # busy is ready
                    raise
        return {"status": "ready", "models": [*self.models.handles]}

    @app.get("/v1/models", tags=["openai"], dependencies=[Depends(authorised)], responses={401: ERRORS[401]})
    async def list_models(self) -> dict:
        """The models that are served."""
        found = [{"id": name, "object": "model", "created": self.began, "owned_by": "geodistill"} for name in self.models.handles]
        return {"object": "list", "data": found}

    @app.post("/v1/chat/completions", tags=["openai"], dependencies=[Depends(authorised)], responses=ERRORS)
    async def chat(self, request: ChatRequest) -> Any:
        """Answer a question on an image; with stream=true as server-sent events."""
        self._need(request.model)
        turns, url = openai.conversation(request)
        data = openai.data_url(url)
        image = await self._fetch(url) if data is None else data
        loop = asyncio.get_running_loop()
        picture, width, height = await loop.run_in_executor(None, opened, image, self.settings.max_pixels)
        show = partial(square, picture)
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        asked = Asked(
            turns, limit=request.max_completion_tokens or request.max_tokens, temperature=request.temperature or 0.0,
            top_p=request.top_p or 1.0, seed=new_seed() if request.seed is None else request.seed % 2**63, stop=stop,
            seconds=self.settings.timeout,
        )  # fmt: skip
        question = turns[-1][0]
        if request.stream:
            growing = self.models.grow(request.model, asked, show)
            first = await anext(growing)  # what is refused is refused with its status, before the answer begins
            return StreamingResponse(
                self._events(request, first, growing, question, (width, height)), media_type="text/event-stream"
            )
        said = await self.models.ask(request.model, asked, show)
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
        size = await self.models.size(model, self.settings.timeout)
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
                    if geographic and not scene.placed:
                        raise Refused(400, "the scene has no coordinates on the earth; ask with geographic=false", "geographic")
                    cut = tiles(scene.width, scene.height, side, side - step)
                    found = await self._look(model, scene, cut, question)
                    draw = partial(scene.geojson, geographic=geographic, model=model)
                    loop = asyncio.get_running_loop()
                    return JSONResponse(await loop.run_in_executor(None, lambda: draw(merged(found, iou))))
            except BadRecord as error:
                raise Refused(400, error.reason) from error
            except ValueError as error:
                raise Refused(400, str(error)) from error
            except ExceptionGroup as errors:  # of a tile
                first = errors.exceptions[0]
                if isinstance(first, (RasterioError, OSError)):
                    raise Refused(400, f"the scene cannot be read ({first})") from errors
                raise first from errors

    async def _look(self, model: str, scene: Scene, cut: list[Tile], question: str) -> list[Found]:
        """What a model finds in the tiles `cut` of a scene; so many of them at a time as a replica answers together."""
        loop, places = asyncio.get_running_loop(), asyncio.Semaphore(self.settings.batch)
        found: list[Found] = []

        async def look(tile: Tile, show: Show) -> None:
            try:
                asked = Asked([(question, None)], seconds=self.settings.timeout)
                said = await self.models.ask(model, asked, show, waits=True)
                ccw = self.settings.angle_counter_clockwise
                found.extend(found_in(tile, scene, question, said.text, said.score, ccw))
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            for tile in cut:
                await places.acquire()
                image = await loop.run_in_executor(None, scene.read, tile)
                if image is None:
                    places.release()
                else:
                    group.create_task(look(tile, partial(square, image)))
        return found

    def _need(self, model: str, text: str = "?") -> None:
        if model not in self.models.handles:
            raise Refused(404, f"model: {model!r} is none of {', '.join(self.models.handles)}", "model")
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
        if not (local(folder, weights=False) / "config.json").is_file():
            raise ValueError(
                f"{name}={folder} holds no model (config.json is missing); run the job that writes it, or correct it"
            )
        deployment: Any = serve.deployment(
            Model,
            name=name,
            max_ongoing_requests=settings.batch + settings.batch // 2,  # the next ones are there when a place becomes free
            max_queued_requests=settings.queue,
            max_surge_percent=settings.surge,
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
        models[name] = deployment.bind(absolute_path(folder), name, settings)
    return models


def build(settings: Settings) -> serve.Application:
    """The application of `Settings`. Raises ValueError for a folder that holds no model."""
    settings = settings.model_copy(update={"needs_token": settings.needs_token or bool(os.environ.get(TOKEN))})
    return Api.bind(settings, models_of(settings))  # type: ignore[attr-defined]
