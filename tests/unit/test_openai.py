"""Requests and answers in OpenAI's form."""

import base64

import pytest
from pydantic import ValidationError

from serving.openai import ChatRequest, Refused, boxes_of, conversation, data_url

URL = "data:image/png;base64,AAAA"
IMAGE = {"type": "image_url", "image_url": {"url": URL}}


def request(*messages, **options):
    return ChatRequest.model_validate({"model": "student", "messages": list(messages), **options})


def user(text, *parts):
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_a_conversation():
    turns, url = conversation(
        request(
            {"role": "system", "content": "You look at ships."},
            user("How many?", IMAGE),
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "And where?"},
        )
    )
    assert turns == [("You look at ships.\nHow many?", "3"), ("And where?", None)]
    assert url == URL


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": "How many?"}], "there is no image"),
        ([user("Where?", IMAGE, IMAGE)], "2 images"),
        ([user("How many <image>?", IMAGE)], "special token"),
        ([user(" ", IMAGE)], "the question is empty"),
        ([user("A?", IMAGE), user("B?")], "two messages of the user"),
        ([user("A?", IMAGE), {"role": "assistant", "content": "a"}], "has to be a question"),
        ([{"role": "assistant", "content": "a"}, user("A?", IMAGE)], "has to follow a question"),
        ([user("A?", IMAGE), {"role": "assistant", "content": "a"}, user("B?", IMAGE)], "in the first message"),
        ([{"role": "user", "content": [{"type": "text"}, IMAGE]}], "needs the field text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "needs the field image_url"),
    ],
)
def test_conversations_that_are_refused(messages, says):
    with pytest.raises(Refused, match=says) as found:
        conversation(request(*messages))
    assert found.value.status == 400


@pytest.mark.parametrize(
    "options",
    [{"n": 2}, {"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"logprobs": True}, {"tools": [{}]}, {"stop": ["a"] * 5},
     {"response_format": {"type": "json_object"}}],
)  # fmt: skip
def test_options_that_cannot_be_served(options):
    with pytest.raises(ValidationError):
        request(user("A?", IMAGE), **options)
    request(user("A?", IMAGE), user="someone", metadata={})  # what changes no answer is passed over


def test_what_a_model_has_written_is_asked_about_as_it_is():
    """A box of no width is no box of a question; in an answer it is what the model said."""
    odd = "{<50><50><50><60>|<400>}"
    said = {"role": "assistant", "content": odd}
    assert conversation(request(user("A?", IMAGE), said, user("B?")))[0] == [("A?", odd), ("B?", None)]
    with pytest.raises(Refused, match="text box"):
        conversation(request(user(odd, IMAGE)))
    with pytest.raises(Refused, match="special token"):
        conversation(request(user("A?", IMAGE), {"role": "assistant", "content": "<image>"}, user("B?")))


def test_a_stop_may_be_a_word():
    assert request(user("A?", IMAGE), stop="USER:").stop == "USER:"
    assert request(user("A?", IMAGE), stop=["USER:", "END"]).stop == ["USER:", "END"]


def test_data_urls():
    assert data_url("data:image/png;base64," + base64.b64encode(b"abc").decode()) == b"abc"
    assert data_url("https://example.org/a.png") is None
    for wrong in ("data:image/png,abc", "data:image/png;base64", "data:image/png;base64,a?b", "data:image/png;base64,aé"):
        with pytest.raises(Refused):
            data_url(wrong)


def test_boxes_have_labels_and_corners_in_pixels():
    answer = (
        "an image with <p>2 ships</p> {<10><20><30><40>|<0>}<delim>{<50><50><70><60>|<90>} and <p>a harbor</p> {<0><0><9><9>}."
    )
    found = boxes_of(answer, "[grounding] describe", 200, 100, True)
    assert [box["label"] for box in found] == ["2 ships", "2 ships", "a harbor"]
    assert found[0] == {"label": "2 ships", "polygon": [[20, 20], [60, 20], [60, 40], [20, 40]], "angle": 0}
    assert sorted(map(tuple, found[1]["polygon"])) == [(115, 35), (115, 75), (125, 35), (125, 75)]  # turned in pixels
    (box,) = boxes_of("{<10><20><30><40>|<5>}", "[refer] where is <p> the red car </p>?", 100, 100, True)
    assert box["label"] == "the red car" and box["angle"] == 5
    assert boxes_of("no box", "where?", 100, 100, True) == []
    assert boxes_of("{<" + "9" * 5000 + "><1><2><3>}", "where?", 100, 100, True) == []
