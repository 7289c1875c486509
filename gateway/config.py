"""Owns the gateway's settings: frozen, parsed once, environment read here only. Used before the loop starts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

ENV_PREFIX = "DEGAS_GATEWAY_"

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

ListOfText = Annotated[tuple[str, ...], NoDecode]
"""Several values: a list in code, text separated by commas in the environment."""


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and says what would be accepted."""


def default_image_processes() -> int:
    """A quarter of the cores, 2 to 8. A picture of 700 by 500 pixels takes some 25 ms of a core to decode and resize."""
    return min(8, max(2, (os.cpu_count() or 1) // 4))


class GatewayConfig(BaseSettings):
    """Everything a gateway can be told. Each field is also an environment variable, `DEGAS_GATEWAY_<FIELD>`.

    Build it with `load`, which reports mistakes as one readable `ConfigError`.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    # where it listens
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535, description="0 picks a free one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="none: no gRPC; 0 picks a free one; `degas serve` uses 8081"
    )

    # the workers behind it
    workers: ListOfText = ()
    default_model: str | None = None
    model_aliases: dict[str, str] = Field(
        default_factory=dict, description="other names a served model answers to, as JSON: {alias: model id}"
    )
    curve_key_dir: str | None = Field(
        None, description="folder with worker.key and gateway.key_secret; used for every tcp:// worker"
    )
    progress_timeout_s: float = Field(3.0, gt=0, description="silence of the decode thread that means lost")
    retry_wait_s: float = Field(30.0, ge=0, description="how long unstarted requests wait for a new worker")

    # who may call
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="none: anybody who can reach the port"
    )
    public: ListOfText = Field(
        (), description="routes open without a key where keys are set: page, readiness, metrics"
    )
    cors_origins: ListOfText = Field((), description="https://app.example, or * for any")
    allowed_hosts: ListOfText = Field(
        (), description="accepted Host names without port; none: loopback names and `host`; *: any"
    )

    # how much it takes
    max_body_bytes: int = Field(24 << 20, ge=1 << 10)
    max_queue: int = Field(128, ge=0, description="requests waiting per worker beyond its rows")
    max_wait_s: float = Field(30.0, gt=0, description="refuse when the queue would take longer than this")
    max_connections: int = Field(10_000, ge=1, description="WebSockets open at once")
    max_prompt_chars: int = Field(1 << 20, ge=1)
    max_n: int = Field(8, ge=1, le=128)
    request_deadline_s: float = Field(300.0, gt=0, description="wall clock of one request, queueing included")
    body_timeout_s: float = Field(30.0, gt=0)
    idle_timeout_s: float = Field(30.0, gt=0, description="a connection without a complete request header")
    drain_deadline_s: float = Field(25.0, ge=0, description="how long streams may go on after SIGTERM")
    write_buffer_bytes: int = Field(256 << 10, ge=4 << 10, description="unread output kept for one client")
    slow_client_s: float = Field(10.0, gt=0, description="a client that reads nothing for so long is cut off")

    # pictures
    image_processes: int = Field(default_factory=default_image_processes, ge=1, le=64)
    max_image_bytes: int = Field(16 << 20, ge=1 << 10)
    max_image_pixels: int = Field(64_000_000, ge=1)
    min_image_side: int = Field(4, ge=1)
    image_timeout_s: float = Field(10.0, gt=0)
    image_memory_bytes: int = Field(2 << 30, ge=256 << 20)

    # what it tells
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool | None = None
    otlp_endpoint: str | None = Field(
        None, description="OpenTelemetry collector for traces, http://host:4318; none: no tracing"
    )
    vllm_metrics: bool = Field(False, description="also export the names vLLM dashboards expect")

    @field_validator("workers", "public", "cors_origins", "allowed_hosts", "api_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for endpoint in value:
            if not re.fullmatch(r"(ipc://.+|tcp://[^/]+:\d+)", endpoint):
                raise ValueError(f"{endpoint!r} is not ipc://<path> or tcp://<host>:<port>")
        if len(set(value)) != len(value):
            raise ValueError("the same endpoint is given twice")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", value):
            raise ValueError(f"{value!r} is not http://<host>:<port>, such as http://127.0.0.1:4318")
        return value

    @field_validator("public")
    @classmethod
    def _check_public(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in ("page", "readiness", "metrics"):
                raise ValueError(f"{name!r} is not one of page, readiness, metrics")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is not an origin such as https://app.example, or *")
        return value

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in value:
            if len(key.get_secret_value()) < 8:
                raise ValueError("a key is shorter than 8 characters")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> GatewayConfig:
        if self.max_image_bytes * 4 // 3 > self.max_body_bytes:
            raise ValueError(
                f"max_image_bytes {self.max_image_bytes} cannot arrive in max_body_bytes {self.max_body_bytes}: "
                f"base64 adds a third; max_body_bytes must be at least {self.max_image_bytes * 4 // 3 + 65536}"
            )
        return self

    def host_names(self) -> frozenset[str] | None:
        """Accepted `Host` names, lower case, without port; None accepts every well-formed one."""
        if "*" in self.allowed_hosts:
            return None
        if self.allowed_hosts:
            return frozenset(name.lower() for name in self.allowed_hosts)
        if self.host in ("0.0.0.0", "::", ""):
            return None
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset((*LOOPBACK_NAMES, own.lower()))

    def key_texts(self) -> tuple[str, ...]:
        """The API keys in the clear. Never log them."""
        return tuple(key.get_secret_value() for key in self.api_keys)


def load(overrides: Mapping[str, Any] | None = None) -> GatewayConfig:
    """Parse the environment and the given overrides, which win. Raises `ConfigError`."""
    fields = GatewayConfig.model_fields
    for name in os.environ:
        field = name.removeprefix(ENV_PREFIX).lower()
        if name.upper().startswith(ENV_PREFIX) and field not in fields:
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f"; did you mean {ENV_PREFIX}{close[0].upper()}?" if close else ""
            raise ConfigError(f"{name} is not a setting of the gateway{hint}")
    try:
        return GatewayConfig(**dict(overrides or {}))
    except SettingsError as error:
        raise ConfigError(str(error)) from None
    except ValidationError as error:
        lines = []
        for item in error.errors(include_input=False, include_url=False, include_context=False):
            where = ".".join(str(part) for part in item["loc"]) or "settings"
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
        raise ConfigError("; ".join(lines)) from None
