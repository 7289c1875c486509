"""Owns the reference stack: FastAPI on uvicorn, jinja2, tokenizers, a pydantic chunk a token, over the same engine's wire.

`PYTHON reference.py ENDPOINT PORT FIRST_ID` in an environment of its own, without anything of this project: servers of open
models are written this way, a queue and a generator a stream, a model of pydantic for each chunk. It does a request's work as
Degas does: the engine's own template and tokenizer make the prompt, and the tokenizer decodes a whole answer. A streamed token's
text is looked up in a table, which is less than a detokenizer does.
"""

from __future__ import annotations

import array
import asyncio
import itertools
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import uvicorn
import zmq
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel
from tokenizers import Tokenizer

ENDPOINT, PORT, FIRST_ID = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
TEXTS = [f" {step:04d}" for step in range(8192)]


class Message(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    model: str
    messages: list[Message]
    max_tokens: int = 16
    stream: bool = False
    temperature: float = 0.0


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]


class Choice(BaseModel):
    index: int = 0
    message: Message
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Create(BaseModel):
    type: str
    model: str
    input: str
    max_output_tokens: int = 16


class TextDelta(BaseModel):
    type: str = "response.output_text.delta"
    sequence_number: int
    item_id: str
    output_index: int = 0
    content_index: int = 0
    delta: str
    logprobs: list[Any] = []


class Engine:
    """The engine's socket; a queue for each sequence."""

    def __init__(self) -> None:
        self.queues: dict[int, asyncio.Queue[int | None]] = {}
        self.ids = itertools.count(1)
        self.epoch = 0
        self.tokenizer: Any = None
        self.template: Any = None
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0

    async def start(self) -> None:
        self.socket.connect(ENDPOINT)
        asyncio.get_running_loop().add_reader(self.socket.fileno(), self.drain)
        while not self.epoch:
            self.send(["Hello", 1, "", "reference"])
            await asyncio.sleep(0.1)
            self.drain()

    def send(self, message: list[Any]) -> None:
        self.socket.send(msgspec.msgpack.encode(message))
        asyncio.get_running_loop().call_soon(self.drain)  # the descriptor is edge-triggered

    def encode(self, messages: list[Message]) -> list[int]:
        """The prompt's ids, as transformers' `apply_chat_template` makes them."""
        turns = [message.model_dump() for message in messages]
        text = self.template.render(messages=turns, tools=None, add_generation_prompt=True)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def submit(self, prompt: list[int], max_tokens: int) -> tuple[int, asyncio.Queue[int | None]]:
        sequence_id = next(self.ids)
        queue = self.queues[sequence_id] = asyncio.Queue()
        ids = array.array("i", prompt).tobytes()
        self.send(["Submit", self.epoch, sequence_id, uuid.uuid4().hex, ids, max_tokens])
        return sequence_id, queue

    def end(self, sequence_id: int) -> None:
        if self.queues.pop(sequence_id, None) is not None:
            self.send(["Cancel", self.epoch, [sequence_id]])

    def drain(self) -> None:
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = msgspec.msgpack.decode(frames[0])
            if message[0] == "Ready":
                self.epoch = message[3]
                self.tokenizer = Tokenizer.from_str(frames[1].decode())
                environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
                self.template = environment.from_string(frames[2].decode())
            elif message[0] == "StepOutputs":
                ids = array.array("q", message[3])
                tokens = array.array("i", message[5])
                for sequence_id, token in zip(ids, tokens, strict=True):
                    queue = self.queues.get(sequence_id)
                    if queue is not None:
                        queue.put_nowait(token)
                for finish in message[6]:
                    queue = self.queues.pop(finish[0], None)
                    if queue is not None:
                        queue.put_nowait(None)


engine = Engine()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await engine.start()
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/readyz")
async def ready() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/v1/chat/completions")
async def chat(request: ChatRequest) -> Any:
    answer_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    prompt = engine.encode(request.messages)
    sequence_id, queue = engine.submit(prompt, request.max_tokens)

    def chunk(delta: Delta, reason: str | None = None) -> str:
        choice = ChunkChoice(delta=delta, finish_reason=reason)
        return f"data: {Chunk(id=answer_id, created=created, model=request.model, choices=[choice]).model_dump_json()}\n\n"

    async def stream() -> AsyncIterator[str]:
        try:
            yield chunk(Delta(role="assistant", content=""))
            while (token := await queue.get()) is not None:
                yield chunk(Delta(content=TEXTS[token - FIRST_ID]))
            yield chunk(Delta(), "length")
            yield "data: [DONE]\n\n"
        finally:
            engine.end(sequence_id)

    if request.stream:
        return StreamingResponse(stream(), media_type="text/event-stream")
    tokens = []
    while (token := await queue.get()) is not None:
        tokens.append(token)
    text = engine.tokenizer.decode(tokens)
    choice = Choice(message=Message(role="assistant", content=text), finish_reason="length")
    usage = Usage(
        prompt_tokens=len(prompt), completion_tokens=len(tokens), total_tokens=len(prompt) + len(tokens)
    )
    done = Completion(id=answer_id, created=created, model=request.model, choices=[choice], usage=usage)
    return JSONResponse(done.model_dump())


@app.websocket("/v1/responses")
async def responses(socket: WebSocket) -> None:
    await socket.accept()
    body = Create.model_validate_json(await socket.receive_text())
    sequence_id, queue = engine.submit(
        engine.encode([Message(role="user", content=body.input)]), body.max_output_tokens
    )
    item_id = f"msg_{uuid.uuid4().hex}"
    try:
        for number in itertools.count():
            token = await queue.get()
            if token is None:
                break
            event = TextDelta(sequence_number=number, item_id=item_id, delta=TEXTS[token - FIRST_ID])
            await socket.send_text(event.model_dump_json())
    except WebSocketDisconnect:
        pass
    finally:
        engine.end(sequence_id)


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=PORT,
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
        backlog=8192,
    )
