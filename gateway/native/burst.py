"""Owns the compiled loop's data, in Python's words: texts of tokens, and the streams that are with it. Gateway's loop.

A stream that is here is written to without Python: no listener, no detokenizer. Whoever is to have it back calls `remove`,
which says how far it came.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Collection, Sequence
from ctypes import byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from gateway.generation import Framing, TextForm
from gateway.native.library import loaded

_FRAMINGS: Final = {Framing.CHUNK: 0, Framing.TEXT_FRAME: 1}
_ARGUMENTS: Final = {
    "texts_new": ([c_char_p, c_char_p, c_char_p, c_int32], c_void_p),
    "texts_free": ([c_void_p], None),
    "texts_get": ([c_void_p, c_int32, c_char_p], c_int32),
    "burst_new": ([], c_void_p),
    "burst_free": ([c_void_p], None),
    "burst_look": ([c_void_p, c_int64, c_void_p], c_int32),
    "burst_remove": ([c_void_p, c_int64, c_void_p], None),
    "burst_rest": ([c_void_p, c_char_p], None),
    "burst_add": (
        [c_void_p, c_void_p, c_int64, c_int32, c_double, c_int32, c_int32, c_char_p]
        + [c_int32] * 4
        + [c_int64, c_int32],
        c_int32,
    ),
    "burst_step": (
        [c_void_p, c_char_p, c_char_p, c_char_p, c_int32, c_int32, c_double] + [c_void_p] * 4,
        c_int32,
    ),
}


class _Left(ctypes.Structure):
    _fields_ = (
        ("last_s", c_double),
        ("number", c_int64),
        ("written", c_int64),
        ("next_index", c_int32),
        ("num_said", c_int32),
    )


_bound: list[ctypes.CDLL] = []  # the library, once its functions have their types


def _library() -> ctypes.CDLL | None:
    found = loaded()
    if found is not None and found not in _bound:
        _bound.append(found)
        for name, (arguments, result) in _ARGUMENTS.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, result
    return found


class TokenTextTable:
    """The texts of a vocabulary's tokens as they stand in JSON; of one that is no whole characters there is none."""

    def __init__(self, library: ctypes.CDLL, token_bytes: Sequence[bytes], silent: Collection[int]) -> None:
        """`silent`: ids whose text is not shown. Raises MemoryError."""
        ends = array("I", accumulate(map(len, token_bytes)))
        marks = bytearray(len(token_bytes))
        for token_id in silent:
            if 0 <= token_id < len(marks):
                marks[token_id] = 1
        self._library = library
        self.pointer = library.texts_new(
            b"".join(token_bytes), ends.tobytes(), bytes(marks), len(token_bytes)
        )
        if not self.pointer:
            raise MemoryError("no room for the texts of tokens")
        weakref.finalize(self, library.texts_free, self.pointer)

    def json(self, token_id: int) -> bytes | None:
        """One token's text in JSON, empty where none is shown; None where it is not here."""
        room = ctypes.create_string_buffer(4096)
        size = self._library.texts_get(self.pointer, token_id, room)
        return None if size < 0 else room.raw[:size]


def text_table(token_bytes: Sequence[bytes], silent: Collection[int]) -> TokenTextTable | None:
    """A table, or None while nothing is compiled."""
    library = _library()
    return None if library is None else TokenTextTable(library, token_bytes, silent)


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a stream came."""

    next_index: int
    last_s: float
    number: int
    said: Sequence[int]  # ids of the tokens that were written, if they were asked for


class Burst:
    """The streams of one worker that are with the compiled loop."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._pointer = library.burst_new()
        if not self._pointer:
            raise MemoryError("no room for streams")
        weakref.finalize(self, library.burst_free, self._pointer)
        self._tables: dict[int, TokenTextTable] = {}  # of the streams here, so that they outlive them
        self._step = library.burst_step
        self._room = 0
        self._nums = (c_int32 * 3)()  # see `burst_step`

    def __len__(self) -> int:
        return len(self._tables)

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._tables

    def add(
        self, sequence_id: int, form: TextForm, table: TokenTextTable, next_index: int, last_s: float
    ) -> bool:
        """Take a stream on; False where it cannot be."""
        before, middle, after = form.parts
        is_here = self._library.burst_add(
            self._pointer,
            table.pointer,
            sequence_id,
            next_index,
            last_s,
            form.descriptor,
            _FRAMINGS[form.framing],
            before + middle + after,
            len(before),
            len(middle),
            len(after),
            form.number is not None,
            form.number or 0,
            form.keeps_text,
        )
        if is_here:
            self._tables[sequence_id] = table
        return bool(is_here)

    def written_bytes(self, sequence_id: int) -> int:
        """What was written of a stream since it is here."""
        left = _Left()
        self._library.burst_look(self._pointer, sequence_id, byref(left))
        return int(left.written)

    def remove(self, sequence_id: int) -> Standing:
        """Take a stream off. It is here."""
        left = _Left()
        self._library.burst_look(self._pointer, sequence_id, byref(left))
        said = (c_int32 * left.num_said)()
        self._library.burst_remove(self._pointer, sequence_id, said)
        del self._tables[sequence_id]
        return Standing(left.next_index, left.last_s, left.number, said)

    def step(
        self, ids: bytes, first: bytes, tokens: bytes, begin: int, now_s: float
    ) -> tuple[int, Sequence[int], Sequence[tuple[float, int]]]:
        """Write what can be of a frame's rows from `begin` on, up to one whose client takes no more.

        Returns where to go on, the indexes of rows that are not for this loop, and times since the tokens before with how
        many had them. Where the call ended early, `rest` has what the last row's client did not take.
        """
        count = len(tokens) // 4
        if count > self._room:
            self._room = count * 2
            self._left = (c_int32 * self._room)()
            self._gaps = (c_double * self._room)()
            self._times = (c_int32 * self._room)()
            arrays = (self._left, self._gaps, self._times, self._nums)
            self._addresses = [ctypes.addressof(one) for one in arrays]
        end = self._step(self._pointer, ids, first, tokens, begin, count, now_s, *self._addresses)
        num_left, num_gaps, _ = self._nums
        gaps = [(self._gaps[i], self._times[i]) for i in range(num_gaps)]
        return end, self._left[:num_left] if num_left else (), gaps

    def rest(self) -> bytes:
        """See `step`; empty where every client took all."""
        size = self._nums[2]
        if not size:
            return b""
        room = ctypes.create_string_buffer(size)
        self._library.burst_rest(self._pointer, room)
        return room.raw


def burst() -> Burst | None:
    """A loop of its own for one worker's streams, or None while nothing is compiled."""
    library = _library()
    return None if library is None else Burst(library)
