"""What comes in and goes out at /v1: OpenAI's chat completions, as far as a model that reads one image can serve them.

Beside the text of an answer there is a field `boxes`: the label, the corners in pixels and the angle of each box in it.
"""

import base64
import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from geodistill.data.record import check_special, check_text
from geodistill.language import box_corners, labelled_boxes

MOST_TEXT = 200_000  # characters of a conversation


class Refused(Exception):
    """A request that gets no answer: the HTTP status, why, and after how many seconds another try makes sense."""

    def __init__(self, status: int, message: str, field: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after = status, message, field, retry_after


class ImageURL(BaseModel):
    """Where an image is: `data:image/png;base64,...`, or http(s):// of a host that the operator has allowed."""

    url: str = Field(max_length=2**28)
    detail: str | None = None


class Part(BaseModel):
    """A part of a message: text, or an image."""

    type: Literal["text", "image_url"]
    text: str | None = Field(None, max_length=20_000)
    image_url: ImageURL | None = None


class Message(BaseModel):
    """One turn. The text of `system` stands before the first question."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = Field(max_length=20_000)


class StreamOptions(BaseModel):
    """include_usage: send a last chunk with the numbers of tokens."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A conversation on one image, which the first message of the user holds. temperature: 0 unless given, the likeliest text."""

    model_config = ConfigDict(extra="ignore")  # clients send more than a server may know, `user` for one

    model: str = Field(max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=200)
    max_tokens: int | None = Field(None, ge=1, le=100_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=100_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[str, Field(max_length=200)] | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    logprobs: Literal[False] | None = False
    tools: list[Any] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None


def conversation(request: ChatRequest) -> tuple[list[tuple[str, str | None]], str]:
    """(turns of question and answer, the last answer None; the URL of the image). Raises Refused."""
    turns: list[tuple[str, str | None]] = []
    before, url = "", ""
    for i, message in enumerate(request.messages):
        where = f"messages[{i}]"
        texts, images = _parts(message, where)
        check = check_special if message.role == "assistant" else check_text  # what a model has written is asked about as it is
        if reason := check(texts):
            raise Refused(400, f"{where}: the text {reason}", where)
        if images and (message.role != "user" or turns or url):
            raise Refused(400, f"{where}: one image, in the first message of the user, is what this model reads", where)
        if message.role in ("system", "developer"):
            before += texts + "\n"
        elif message.role == "user":
            if turns and turns[-1][1] is None:
                raise Refused(400, f"{where}: two messages of the user follow each other; put them into one", where)
            url = images[0] if images else url
            if not texts.strip():
                raise Refused(400, f"{where}: the question is empty", where)
            turns.append((before + texts, None))
            before = ""
        elif not turns or turns[-1][1] is not None:
            raise Refused(400, f"{where}: an answer of the assistant has to follow a question", where)
        else:
            turns[-1] = (turns[-1][0], texts)
    if not turns or turns[-1][1] is not None:
        raise Refused(400, "messages: the last message has to be a question of the user", "messages")
    if sum(len(question) + len(answer or "") for question, answer in turns) > MOST_TEXT:
        raise Refused(400, f"messages: more than {MOST_TEXT} characters are longer than any model here reads", "messages")
    if not url:
        raise Refused(400, "messages: there is no image; give one as an image_url part of the first message", "messages")
    return turns, url


def _parts(message: Message, where: str) -> tuple[str, list[str]]:
    if isinstance(message.content, str):
        return message.content, []
    texts, images = [], []
    for j, part in enumerate(message.content):
        if part.type == "text":
            if part.text is None:
                raise Refused(400, f"{where}.content[{j}]: a part of type text needs the field text", f"{where}.content[{j}]")
            texts.append(part.text)
        elif part.image_url is None:
            raise Refused(
                400, f"{where}.content[{j}]: a part of type image_url needs the field image_url", f"{where}.content[{j}]"
            )
        else:
            images.append(part.image_url.url)
    if len(images) > 1:
        raise Refused(400, f"{where}: {len(images)} images, but this model reads one", where)
    return "\n".join(texts), images


def data_url(url: str) -> bytes | None:
    """What a data URL holds; None: it is another URL. Raises Refused."""
    if url[:5].lower() != "data:":
        return None
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused(400, "image_url: a data URL has to look like data:image/png;base64,...", "image_url")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:  # binascii.Error is one
        raise Refused(400, f"image_url: the data URL is no base64 ({error})", "image_url") from error


def boxes_of(answer: str, question: str, width: int, height: int, counter_clockwise: bool) -> list[dict]:
    """The boxes in an answer: {"label", "polygon": four corners [x, y] in pixels of the image, "angle": degrees}."""
    return [
        {
            "label": label,
            "polygon": [[round(x, 2), round(y, 2)] for x, y in box_corners(box, width, height, counter_clockwise)],
            "angle": box.theta,
        }
        for label, box in labelled_boxes(answer, question)
    ]


def new_id() -> str:
    """The id of a completion."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def usage(prompt: int, completion: int) -> dict:
    """Numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(name: str, model: str, text: str, boxes: list[dict], reason: str, tokens: dict) -> dict:
    """A whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None, "boxes": boxes}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {
        "id": name,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": tokens,
    }


def chunk(name: str, created: int, model: str, delta: dict, reason: str | None = None, **more: Any) -> str:
    """A piece of an answer, as a server-sent event."""
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
    body = {"id": name, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices} | more
    return event(body)


def event(body: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def error(message: str, status: int, field: str | None = None) -> dict:
    """The body of an answer that is an error."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    of = kind.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": of, "param": field, "code": status}}
