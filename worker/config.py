"""Owns the worker's settings: frozen, parsed once, environment and flags read here only. Used before any thread."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "DEGAS_WORKER_"
POCKET = "pocket"


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and says what would be accepted."""


class WorkerConfig(BaseSettings):
    """Everything a worker can be told. Each field is also `DEGAS_WORKER_<FIELD>` and `--<field>`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, cli_kebab_case=True)

    endpoint: str = Field("ipc:///tmp/degas-worker.sock", description="ZeroMQ address to bind")
    model: str = Field(
        POCKET,
        description="an embedded model (pocket, smollm2), 'sim', a folder, a GGUF file, or a hub's org/name",
    )
    device: Literal["auto", "cuda", "cpu", "sim"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(1, ge=1, le=256, description="CPU compute threads; more than one needs idle cores")
    native: bool = Field(True, description="CPU: compile the decode step's operations if there is a compiler")
    depth: int = Field(
        2, ge=1, le=4, description="most steps in flight; 1 is blocking mode, beyond 2 by need"
    )
    late_launch: bool = Field(True, description="while a row is free, launch just before the device runs dry")
    max_rows: int = Field(32, ge=1, le=1024, description="sequences decoded together")
    max_waiting: int = Field(256, ge=0)
    page_tokens: int = Field(16, ge=1, le=256)
    num_pages: int = Field(0, ge=0, description="KV pages; 0: from the memory that is free")
    kv_bytes: int = Field(512 << 20, ge=1 << 20, description="bound on KV memory on the CPU")
    step_tokens: int = Field(2048, ge=16, description="tokens of one step")
    mixed_tokens: int = Field(1024, ge=16, description="the same while rows decode: bounds their gap")
    step_crops: int = Field(26, ge=1, description="image crops encoded in one step; one picture always may")
    mixed_crops: int = Field(13, ge=1, description="the same while rows decode: bounds their gap")
    warm_up_s: float = Field(120.0, ge=0, description="GPU: time to compile and capture before readiness")
    prefix_cache: bool = True
    device_automata: bool = Field(True, description="regular constraints run on the device, without the host")
    feature_bytes: int = Field(256 << 20, ge=0, description="image features kept for repeated pictures")
    sim_profile: str = Field("b200", description="step times of the simulated device")
    curve_key_dir: str | None = Field(
        None, description="folder with worker.key_secret and gateways' public keys"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool | None = None
    beat_fd: int = Field(-1, description="file descriptor the supervisor reads progress from")
    report_startup: bool = Field(False, description="print DEGAS-PHASE, DEGAS-PROGRESS and DEGAS-READY lines")

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


def load(arguments: list[str] | None = None) -> WorkerConfig:
    """Read flags, then environment, then defaults. Raises `ConfigError`; exits on `--help`."""
    try:
        return WorkerConfig(_cli_parse_args=arguments if arguments is not None else False)  # type: ignore[call-arg]
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"]) or "settings"
            lines.append(f"{name}: {item['msg']}")
        raise ConfigError("; ".join(lines)) from None
