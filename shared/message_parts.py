"""Owns what gateway⇄worker messages carry: a request's wishes, a model's card, a sequence's end and scores. Imported by every process.

Fields are appended with defaults, never reordered or removed. Pictures have a module of their own, `shared.image_spec`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shared.errors import ErrorCode, FinishReason
from shared.image_spec import ImageSpec


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Parent of everything that only travels inside a message, `shared.image_spec` aside."""


class Sampling(Part, frozen=True):
    """How one sequence's tokens are chosen. `temperature` 0 is greedy; the rest is then unused."""

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    suppress_ids: list[int] = []
    num_logprobs: int = -1  # -1: none; 0: the sampled token's; n: also those of the n most likely
    min_tokens: int = 0
    num_prompt_logprobs: int = (
        -1
    )  # -1: none; 0: each prompt token's; n: also those of the n most likely in its place


class Grammar(Part, frozen=True):
    """A constraint on the output. `kind` is json_schema, json_object, regex, choice or lark; `source` its text."""

    kind: str
    source: str


class ThinkingBudget(Part, frozen=True):
    """How many tokens a thought may have before its closing mark is forced. Not beside a grammar."""

    budget: int
    opens: list[int]  # the opening mark's token ids; empty: the prompt ends within the thought
    closes: list[int]  # the closing mark's


class PromptValue(Part, frozen=True):
    """A coordinate [x] or a size [width, height] in fractions of the picture, in place of the prompt's id at `index`."""

    index: int
    values: list[float]


class FeatureFormat(Part, frozen=True):
    """How a worker holds pictures' features, and of which weights they are. Only equal formats fit each other."""

    dtype: str  # torch's name of an element: float32, bfloat16, float16; int64 of the simulated device
    columns: int  # elements of one position
    weights: str  # digest of the model's files and of how they were read


ELEMENT_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}
"""Bytes of an element by `FeatureFormat.dtype`."""


class PageFormat(Part, frozen=True):
    """What a page of KV memory holds, and by which weights it was computed. Only equal formats fit each other."""

    dtype: str  # of keys and values, torch's name
    page_tokens: int
    layout: (
        str  # layers, heads and their size, and what layers that convolve keep: for comparing and for people
    )
    page_bytes: int
    weights: str  # digest of the model's files and of how they are read


class PrefillAt(Part, frozen=True):
    """The worker with the role `prefill` that may compute a prompt's pages, and from how many tokens on it pays to ask it."""

    endpoint: str  # as the gateway reaches it
    min_tokens: int  # of the prompt that are not in the worker's own prefix cache


class ModelCard(Part, frozen=True):
    """What a gateway needs to know of the model a worker serves."""

    model_id: str
    family: str  # moondream | llama | qwen3 | fake
    context_tokens: int
    vocab_size: int
    bos_id: int | None
    eos_ids: list[int]
    created: int = 0
    image: ImageSpec | None = None
    capabilities: list[str] = []  # chat, query, caption, detect, point, segment
    templates: dict[str, list[int]] = {}  # query_prefix, query_suffix, caption_short, … as token ids
    suppress_ids: list[int] = []  # never sampled in an answer
    default_max_tokens: int = 256
    default_temperature: float = 0.0
    default_top_p: float = 1.0
    description: str = ""
    owned_by: str = "degas"
    coord_id: int = 5
    size_id: int = 6
    default_top_k: int = 0  # 0: no limit
    special_tokens: dict[str, str] = {}  # bos_token, eos_token, … as a chat template knows them
    default_min_p: float = 0.0
    default_repetition_penalty: float = 1.0
    chat_templates: dict[str, str] = {}  # those besides the default one, by name: tool_use, rag
    weight_bytes: int = 0  # as they are held by the worker; 0: not told


class Limits(Part, frozen=True):
    """The worker's own bounds, so that the gateway can refuse with numbers in the message."""

    max_rows: int
    max_waiting: int
    num_pages: int
    page_tokens: int
    step_tokens: int  # token budget of one step
    max_sequence_tokens: int
    progress_timeout_s: float = (
        3.0  # silence beyond what the last `Beat` expected that means the worker hangs
    )
    feature_bytes: int = 0  # of pictures' features that it keeps for repeated pictures


class Timing(Part, frozen=True):
    """Where one sequence's time went, in seconds."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Finish(Part, frozen=True):
    """The terminal event of a sequence. `code` and `message` are set when `reason` is error."""

    sequence_id: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    code: ErrorCode | None = None
    message: str = ""
    timing: Timing = Timing()
    preemptions: int = 0


class TokenValues(Part, frozen=True):
    """The decoded coordinate (x or y) or size (width, height) of a spatial token: floats near [0, 1], not clamped."""

    sequence_id: int
    token_index: int
    values: list[float]
    logprob: float = 0.0  # not used
    logprobs: list[
        float
    ] = []  # of the bins that the values come from, one a value, where they were asked for


class TokenLogprobs(Part, frozen=True):
    """Log-probabilities of one generated token: its own, then the most likely `(id, logprob)` pairs."""

    sequence_id: int
    token_index: int
    logprob: float
    top_ids: bytes = b""  # packed int32
    top_logprobs: list[float] = []


class PromptLogprobs(Part, frozen=True):
    """Log-probabilities of consecutive prompt tokens, from the token at `first` on, each given all tokens before it.

    `logprobs` is packed float32 and `ranks` packed int32 (1: the most likely token of its place), an entry a token;
    `top_ids` (int32) and `top_logprobs` (float32) have the k most likely for each token in turn, k as asked.
    """

    sequence_id: int
    first: int
    logprobs: bytes
    ranks: bytes
    top_ids: bytes = b""
    top_logprobs: bytes = b""
