"""Owns the worker's settings: frozen, parsed once, environment and flags read here only. Used before any thread."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from shared.control_groups import num_cores
from shared.settings import ConfigError as ConfigError
from shared.settings import Section

POCKET = "pocket"


def default_threads() -> int:
    """The number of cores that this process may use, less one for the gateway; at least 1."""
    return max(1, num_cores() - 1)


class WorkerConfig(BaseModel):
    """Everything a worker can be told. Build it with `load`, which reports mistakes as one readable `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    endpoint: str = Field("ipc:///tmp/degas-worker.sock", description="ZeroMQ address to bind")
    curve_key_dir: str | None = Field(
        None, description="folder with worker.key_secret and gateways' public keys"
    )

    role: Literal["all", "encode", "decode", "prefill"] = Field(
        "all",
        description="what it does of a request. all: everything. encode: it encodes pictures for workers with the role decode, "
        "and nothing else. prefill: it computes long prompts for them, and nothing else. decode: everything, but pictures come "
        "encoded, and the pages of long prompts computed, while there is such a worker with the same model, dtype and quantize",
    )
    prefill_wait_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="with the role decode: how long a prompt waits for pages from a prefill worker; what has not come by then is "
        "computed here",
    )
    prefill_bytes: ByteSize = Field(
        ByteSize(256 << 20),
        ge=0,
        description="with the role decode: pages that may be on their way from prefill workers at once, of one prompt any number; "
        "further prompts are computed here",
    )

    model: str = Field(
        POCKET,
        description="an embedded model (pocket, smollm2), 'sim', a folder, a GGUF file, or a hub's org/name",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 on a GPU, and on a CPU that multiplies it, unless the model is small and there are no "
        "compiled bf16 products; else float32",
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None,
        description="round the matrices of a model in float weights to 8 or 4 bits as it loads: int8 loses next to nothing, "
        "int4 more, the smaller the model (degas bench quality). Kept in ~/.cache/degas for later starts. On a CPU it needs the compiled operations, and activations "
        "are float32",
    )
    chat_template: str | None = Field(
        None,
        description="a file with the Jinja template that chats are rendered by, or the name of one of the model's; none: the "
        "model's own",
    )
    context: int = Field(
        0,
        ge=0,
        description="most tokens of a sequence, prompt and answer; 0: as many as the model and memory allow",
    )

    device: Literal["auto", "cuda", "cpu", "sim"] = Field(
        "auto", description="auto: cuda where torch sees a GPU, else cpu"
    )
    threads: int = Field(
        0,
        ge=0,
        le=256,
        description="CPU compute threads; 0: the cores, or as many as a container's limit allows, but one, which is the gateway's; at least 1",
    )
    native: bool = Field(
        True,
        description="on a CPU: compile the decode step's operations for this processor, if "
        "there is a C++ compiler (once, some seconds; kept in ~/.cache/degas). The images bring them ready for all "
        "x86-64 processors with AVX2. Off, or without either: torch alone",
    )
    activations: Literal["auto", "int8", "exact"] = Field(
        "auto",
        description="on a CPU, for the quantised weights of a GGUF file. int8: inputs of products are rounded to 8 bits, 16 to a "
        "scale, and multiplied as whole numbers; exact: weights are read as floats. auto: int8, unless dtype is "
        "bfloat16 and the processor has matrix registers (AMX)",
    )
    warm_up_s: float = Field(
        120.0,
        ge=0,
        description="GPU: time to compile and capture before readiness; the rest is captured later. CPU: 0 encodes no picture "
        "before readiness; else one of a model that reads pictures, and larger ones for up to 2 seconds",
    )
    gpu_without: str = Field(
        "", description="GPU: switches to turn off, comma separated, for comparison (docs/gpu.md lists them)"
    )
    gpu_with: str = Field(
        "",
        description="GPU: switches to turn on that are off by default, comma separated (docs/gpu.md lists them)",
    )
    sim_profile: str = Field("b200", description="step times of the simulated device")

    depth: int = Field(
        2,
        ge=1,
        le=4,
        description="most steps in flight; 1 is blocking mode. 3 helps where a step takes about half a millisecond: "
        "it is then taken and left by what the device loses at two and at three",
    )
    late_launch: bool = Field(True, description="while a row is free, launch just before the device runs dry")
    max_rows: int = Field(32, ge=1, le=1024, description="sequences decoded together")
    max_waiting: int = Field(256, ge=0, description="sequences that wait for a row; more are refused")
    step_tokens: int = Field(2048, ge=16, description="tokens of one step")
    step_s: float | None = Field(
        None,
        ge=0,
        description="time that a step may take; none: 0.25 on a CPU, no bound elsewhere; 0: no bound",
    )
    gap_s: float | None = Field(
        None,
        ge=0,
        description="the same while rows decode, their own time included: the gap between their tokens; none: half of step_s",
    )
    mixed_tokens: int = Field(1024, ge=16, description="the same while rows decode")
    step_crops: int = Field(26, ge=1, description="image crops encoded in one step; one picture always may")
    mixed_crops: int = Field(13, ge=1, description="the same while rows decode")
    device_automata: bool = Field(True, description="regular constraints run on the device, without the host")

    page_tokens: int = Field(16, ge=1, le=256, description="tokens of one KV page")
    num_pages: int = Field(0, ge=0, description="KV pages; 0: from the memory that is free")
    kv_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="on a CPU, what keys and values are kept in: auto takes bfloat16 where the compiled attention reads it, "
        "half the memory and quicker behind long contexts, unless dtype asks for float32",
    )
    kv_bytes: ByteSize = Field(ByteSize(512 << 20), ge=1 << 20, description="bound on KV memory on the CPU")
    prefix_cache: bool = Field(
        True, description="keep the KV pages of prompts for later ones that begin alike"
    )
    feature_bytes: ByteSize = Field(
        ByteSize(256 << 20), ge=0, description="image features kept for repeated pictures"
    )

    check_memory: bool = Field(
        True,
        description="before a model loads, count from its files' headers what it will take: refuse it if that is more than is free "
        "here, and keep fewer KV pages and image features where those would not fit. Off: load it whatever is free",
    )

    price_per_hour: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="price of an hour of this worker's device, in any currency: tokens per unit of it are then on /metrics; "
        "none: no such figures",
    )

    kv_events: str | None = Field(
        None,
        description="ZeroMQ address to publish at which prefixes are cached, as vLLM does for prefix-aware routers: tcp://*:5557; "
        "none: off. Prompts' token ids go out unencrypted: only into a network that you trust",
    )
    kv_events_replay: str | None = Field(
        None,
        description="ZeroMQ address where a router that missed some of these events asks for them again; none: it cannot",
    )
    kv_events_topic: str = Field(
        "",
        max_length=512,
        description="what these messages begin with; llm-d wants kv@<pod's address>@<model>",
    )
    kv_events_form: Literal["arrays", "maps"] = Field(
        "arrays",
        description="an event as an array, which routers have read from the beginning, or as a map with names, which vLLM writes "
        "since June 2026",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_json: bool | None = Field(None, description="JSON lines; none: where stderr is no terminal")
    progress_timeout_s: float = Field(
        3.0,
        gt=0,
        description="silence of the decode thread, beyond what its steps should take, that means it hangs",
    )
    drain_s: float = Field(
        20.0,
        ge=0,
        le=86400,
        description="how long what it has begun may go on after SIGTERM; a supervisor has to allow as much (worker_grace_s)",
    )
    beat_fd: int = Field(-1, description="file descriptor the supervisor reads progress from")
    report_startup: bool = Field(False, description="print DEGAS-PHASE, DEGAS-PROGRESS and DEGAS-READY lines")

    @field_validator("threads")
    @classmethod
    def _count_cores(cls, value: int) -> int:
        return value or default_threads()

    @field_validator("kv_events", "kv_events_replay")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"ipc://.+|tcp://.+:\d{1,5}", value) is None:
            raise ValueError(
                f"{value!r} is no address to bind; a safe value is tcp://127.0.0.1:5557, or none"
            )
        return value

    @model_validator(mode="after")
    def _check_kv_events(self) -> WorkerConfig:
        if self.kv_events is not None and not self.prefix_cache:
            raise ValueError(
                "kv_events tells of the prefix cache, and prefix_cache is off; a safe value is none"
            )
        if self.kv_events is not None and self.kv_events_replay == self.kv_events:
            raise ValueError(
                f"kv_events_replay is {self.kv_events}, as kv_events is; a safe value has another port"
            )
        return self

    @model_validator(mode="after")
    def _check_budgets(self) -> WorkerConfig:
        if self.mixed_tokens <= self.max_rows:
            raise ValueError(
                f"mixed_tokens is {self.mixed_tokens} and max_rows {self.max_rows}: decoding rows would leave "
                f"prefill no budget; a safe value is {self.max_rows + 512}"
            )
        if self.step_crops < self.mixed_crops:
            raise ValueError(f"step_crops is below mixed_crops; a safe value is {self.mixed_crops}")
        if self.step_tokens < self.mixed_tokens:
            raise ValueError(f"step_tokens is below mixed_tokens; a safe value is {self.mixed_tokens}")
        return self


WORKER_SETTINGS: Final = Section(
    "worker",
    WorkerConfig,
    groups={
        "endpoint": "gateways",
        "model": "model",
        "device": "device",
        "depth": "steps",
        "page_tokens": "memory",
        "kv_events": "routers",
        "log_level": "logs",
    },
    hidden=("beat_fd", "report_startup"),
)


def load(flags: Mapping[str, object] | None = None, file: Path | None = None) -> WorkerConfig:
    """Parse flags, then environment, then the file, then defaults. Raises `ConfigError`."""
    return WORKER_SETTINGS.load(flags or {}, os.environ, file)
