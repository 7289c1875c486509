"""Owns a conversation as a model without a chat template is asked it, query by query. No sockets; gateway's loop.

Moondream was trained on single questions. Its reference engine (kestrel, `skills/chat.py`) serves a conversation as a row of
them: BOS once, then for every user turn its pictures, the query prefix, the text, the query suffix and the assistant's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.api.pictures import placed_before, prepare_pictures
from gateway.generation import Core, PreparedImage, RequestError, ServedModel, no_pictures
from shared.errors import ErrorCode

_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class QueryTurn:
    """A message, as far as a query has a place for it."""

    role: str
    text: str
    num_pictures: int


async def compose_turns(
    core: Core, model: ServedModel, messages: Sequence[QueryTurn], pictures: Sequence[tuple[str, str]]
) -> tuple[list[int], list[PreparedImage]]:
    """The prompt's ids without the pictures' positions, and the pictures where they stand in it.

    `pictures` are the URL and the field's name of each, in the messages' order. A system message is folded into the next user
    turn. One turn with one picture gives what `task_prompt` does. Raises `RequestError`.
    """
    _check_turns(messages)
    if pictures and model.card.image is None:
        raise no_pictures(model.card, pictures[-1][1])
    images = await prepare_pictures(core, model, pictures) if pictures else []
    prefix, suffix = (model.card.templates.get(f"query_{part}", []) for part in ("prefix", "suffix"))
    ids = [] if model.card.bos_id is None else [model.card.bos_id]
    placed: list[PreparedImage] = []
    told: list[str] = []  # system messages that no user turn has taken yet
    for message in messages:
        if message.role in _SYSTEM:
            told.append(message.text.strip())
            continue
        if message.role == "assistant":
            # Clients were shown the answer without the space that may begin it, and send it back so.
            ids += [*suffix, *await model.encode(message.text)]
            continue
        own = images[len(placed) : len(placed) + message.num_pictures]
        placed += [placed_before(image, len(ids)) for image in own]
        text = "\n\n".join(filter(None, (*told, message.text.strip())))
        told.clear()
        ids += [*prefix, *await model.encode(text)] if text else prefix
    return [*ids, *suffix], placed


def _check_turns(messages: Sequence[QueryTurn]) -> None:
    """Raises `RequestError` for a conversation that does not end with a question, or has pictures where none can stand."""
    asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if asked is None:
        raise RequestError(
            ErrorCode.INVALID_REQUEST, "messages: one with the role user is needed", param="messages"
        )
    if not messages[asked].text.strip():
        raise _invalid("the last user message has no text; ask something about the picture", asked)
    for index, message in enumerate(messages):
        if message.role in _SYSTEM and index > asked:
            raise _invalid("a system message stands before the user message that it is for", index)
        if message.role != "user" and message.num_pictures:
            raise _invalid("this model takes pictures in user messages", index)


def _invalid(message: str, index: int) -> RequestError:
    param = f"messages[{index}].content"
    return RequestError(ErrorCode.INVALID_REQUEST, message, param=param)
