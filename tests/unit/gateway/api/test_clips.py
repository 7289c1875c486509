"""Videos as clients send them: both spellings, their times, and what is refused with what to send instead."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from gateway.api.chat import ChatBody, prepare
from gateway.api.clips import INSTEAD, Clip, ClipPart, clip_of, no_clips, settle_times
from gateway.api.prompts import Message, clips_of
from gateway.generation import RequestError
from shared.clips import ClipTimes
from tests.unit.gateway.api.fake_core import FakeCore, FakeModel

URL = "data:video/jpeg;base64,AAAA,BBBB,CCCC"
LISTED = ["data:image/png;base64,AAAA", "data:image/png;base64,BBBB", "data:image/png;base64,CCCC"]
EVEN = ClipTimes((0.0, 0.5, 1.0), 2.0)


def part(**fields: Any) -> ClipPart:
    kind = "video_url" if "video_url" in fields else "video"
    made: ClipPart = msgspec.convert({"type": kind, **fields}, ClipPart)
    return made


def read(**fields: Any) -> Clip:
    return clip_of(part(**fields), "here")


@pytest.mark.parametrize(
    ("fields", "times"),
    [
        ({"video_url": {"url": URL}, "fps": 2}, EVEN),
        ({"video_url": {"url": URL}, "fps": "2.0"}, EVEN),
        ({"video": LISTED, "fps": 2.0}, EVEN),
        ({"video": LISTED, "sample_fps": "2"}, EVEN),
        ({"video": URL, "fps": 2.0}, EVEN),
        ({"video": LISTED}, None),
        ({"video": LISTED, "fps": 2.0, "duration": 9}, ClipTimes((0.0, 0.5, 1.0), 2.0, 9.0)),
        ({"video": LISTED, "duration": 1.5}, ClipTimes((0.0, 0.5, 1.0), 2.0, 1.5)),
        ({"video": LISTED, "timestamps": [0, 0.5, 7]}, ClipTimes((0.0, 0.5, 7.0))),
    ],
    ids=str,
)
def test_spellings(fields: dict[str, Any], times: ClipTimes | None) -> None:
    clip = read(**fields)
    assert clip.times == times
    bodies = [url.partition(",")[2] for url, _ in clip.frames]
    assert bodies == ["AAAA", "BBBB", "CCCC"]
    listed = isinstance(fields.get("video"), list)
    assert clip.frames[2][1] == ("here.video[2]" if listed else clip.param)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (
            {"video_url": {"url": "data:video/mp4;base64,AAAA"}},
            "video_url.url",
            "files (video/mp4) are not decoded",
        ),
        ({"video_url": {"url": "https://host/a.mp4"}}, "video_url.url", "not fetched"),
        ({"video": "file:///a.webm"}, "video", "not fetched"),
        ({"video": "data:video/webm;base64,AAAA"}, "video", "files (video/webm) are not decoded"),
        ({"video": "data:video/jpeg,AAAA"}, "video", "does not say ;base64"),
        ({"video": []}, "video", "at least one frame"),
        ({"video": "data:video/jpeg;base64,AAAA,,BBBB"}, "video", "frame 1 of 3 is empty"),
        ({"video": LISTED, "fps": 0}, "fps", "above 0"),
        ({"video": LISTED, "fps": "often"}, "fps", "above 0"),
        ({"video": LISTED, "sample_fps": "nan"}, "sample_fps", "above 0"),
        ({"video": LISTED, "fps": 1, "sample_fps": 2}, "fps", "either"),
        ({"video": LISTED, "fps": 1, "timestamps": [0, 1, 2]}, "timestamps", "either"),
        ({"video": LISTED, "timestamps": [0, 1]}, "timestamps", "2 times for 3 frames"),
        ({"video": LISTED, "timestamps": [0, 2, 1]}, "timestamps", "in the order"),
        ({"video": LISTED, "fps": 1e-5}, "fps", "longer than 86400 seconds"),
    ],
    ids=str,
)
def test_what_is_refused_names_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(**fields)
    assert caught.value.param == f"here.{param}" and words in caught.value.message
    if "decoded" in words or "fetched" in words:
        assert INSTEAD in caught.value.message


def body(**more: Any) -> ChatBody:
    content = [{"type": "video_url", "video_url": {"url": URL}}, {"type": "video", "video": LISTED, "fps": 4}]
    messages = [{"role": "user", "content": content}]
    return msgspec.convert({"messages": messages, **more}, ChatBody)


@pytest.mark.parametrize(
    ("more", "times"),
    [
        ({"mm_processor_kwargs": {"fps": 2.0}}, EVEN),
        ({"mm_processor_kwargs": {"fps": [2.0, 9.0], "do_sample_frames": False}}, EVEN),
        ({"media_io_kwargs": {"video": {"fps": 2.0}}}, EVEN),
        ({"media_io_kwargs": {"video": {"fps": 30.0, "total_num_frames": 45}}}, EVEN),
        (
            {"media_io_kwargs": {"video": {"fps": 30, "frames_indices": [0, 15, 210], "duration": 8}}},
            ClipTimes((0.0, 0.5, 7.0), duration=8.0),
        ),
        ({"media_io_kwargs": {"video": {}}}, None),
        ({}, None),
    ],
    ids=str,
)
def test_times_in_vllms_fields_of_the_request(more: dict[str, Any], times: ClipTimes | None) -> None:
    sent = body(**more)
    parts = clips_of(sent.messages)
    settle_times(parts, sent.media_io_kwargs, sent.mm_processor_kwargs)
    first, second = (clip_of(*one) for one in parts)
    assert first.times == times
    assert second.times is not None and second.times.fps == 4, "a part's own times come first"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        (
            {"media_io_kwargs": {"video": {"fps": 30, "frames_indices": [1]}}},
            "media_io_kwargs.video.frames_indices",
        ),
        (
            {"media_io_kwargs": {"video": {"fps": 30, "frames_indices": [3, 2, 1]}}},
            "media_io_kwargs.video.frames_indices",
        ),
        ({"media_io_kwargs": {"video": {"fps": -1}}}, "media_io_kwargs.video.fps"),
        (
            {"media_io_kwargs": {"video": {"do_sample_frames": True}}},
            "media_io_kwargs.video.do_sample_frames",
        ),
        ({"mm_processor_kwargs": {"fps": ["x"]}}, "mm_processor_kwargs.fps"),
        ({"mm_processor_kwargs": {"do_sample_frames": True}}, "mm_processor_kwargs.do_sample_frames"),
    ],
    ids=str,
)
def test_wrong_times_of_the_request_name_the_field(more: dict[str, Any], param: str) -> None:
    sent = body(**more)
    with pytest.raises(RequestError) as caught:
        settle_times(clips_of(sent.messages), sent.media_io_kwargs, sent.mm_processor_kwargs)
    assert caught.value.param == param


def test_a_model_that_reads_none_says_so_whatever_was_sent() -> None:
    core = FakeCore(FakeModel())
    for url in (URL, "data:video/mp4;base64,AAAA"):
        messages = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]
        data = msgspec.json.encode({"messages": messages})
        with pytest.raises(RequestError, match=r"reads no videos.*single frames as pictures") as caught:
            asyncio.run(prepare(core, data, request_id="r", tenant=""))
        assert caught.value.param == "messages[0].content[0].video_url.url"
    card = msgspec.structs.replace(core.served.card, image=None)
    assert "it reads text only" in no_clips(card, "x").message


def test_what_a_message_holds_counts() -> None:
    (message,) = body().messages
    assert isinstance(message, Message)
    assert message.picture_chars() == len(URL) + sum(map(len, LISTED)) and message.num_pictures == 0
    assert message.for_template()["content"] == [{"type": "video"}, {"type": "video"}]
