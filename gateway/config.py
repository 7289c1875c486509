"""Owns the gateway's settings: frozen, parsed once, environment and flags read here only. Used before the loop starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, field_validator, model_validator

from gateway.origins import read_origin
from shared.control_groups import num_cores
from shared.settings import ConfigError as ConfigError
from shared.settings import Section

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]+):\d{1,5}", re.ASCII)
_WORKERS = re.compile(r"ipc://.+|file:///.+|(tcp|dns)://[^/]+:\d{1,5}|https?://[^/\s]+/\S*")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def default_image_processes() -> int:
    """A quarter of the cores, 2 to 8. A picture of 700 by 500 pixels takes some 25 ms of a core to decode and resize."""
    return min(8, max(2, num_cores() // 4))


class GatewayConfig(BaseModel):
    """Everything a gateway can be told. Build it with `load`, which reports mistakes as one readable `ConfigError`.

    Several values are a list in code and in the file, and text separated by commas in flags and variables.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="HTTP and WebSocket port; 0 picks a free one")
    grpc_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="gRPC port; 0 picks a free one; none or -1: no gRPC; `degas serve` uses 8081",
    )

    gateways: int = Field(
        1,
        ge=1,
        le=64,
        description="gateways that listen on these ports, each a process, over the same workers",
    )
    own_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="one more HTTP port, of one process alone, for probes and metrics where several share `port`; `degas "
        "serve` gives each gateway one, this and those that follow, or free ones",
    )

    workers: tuple[str, ...] = Field(
        (),
        description="their endpoints, ipc://<path>, tcp://<host>:<port>, dns://<name>:<port> for every address of a name, or "
        "a list of tcp:// endpoints, a line each, at file:///<path> or http://<host>:<port>/<path>; `degas serve` has its own",
    )
    worker_lookup_s: float = Field(
        2.0, ge=0.1, le=300, description="how often dns://, file:// and http:// are looked up again"
    )
    default_model: str | None = Field(
        None, description="the model of requests that name none; none: the first that was announced"
    )
    model_aliases: dict[str, str] = Field(
        default_factory=dict, description="other names a served model answers to, as JSON: {alias: model id}"
    )
    curve_key_dir: str | None = Field(
        None,
        description="folder with worker.key and gateway.key_secret; used for every worker but those of ipc://",
    )
    retry_wait_s: float = Field(30.0, ge=0, description="how long unstarted requests wait for a new worker")

    api_keys: tuple[SecretStr, ...] = Field((), description="none: anybody who can reach the port")
    keys_file: str | None = Field(
        None, description="API keys with tenants and limits, a line each, read again when it changes"
    )
    public: tuple[str, ...] = Field(
        (), description="routes open without a key where keys are set: page, readiness, metrics"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="https://app.example, https://*.app.example, app://name, null; or * for any"
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="accepted Host names without port; none: loopback names and `host`; *: any"
    )

    max_body_bytes: ByteSize = Field(ByteSize(24 << 20), ge=1 << 10, description="largest body of a request")
    max_unfinished_bytes: ByteSize = Field(
        ByteSize(256 << 20),
        ge=1 << 10,
        description="bodies and messages still arriving, all of one key's together",
    )
    prefill_tokens: int = Field(
        1024,
        ge=1,
        description="prompts of at least so many tokens beyond what its worker has cached are computed by a prefill worker, where "
        "there is one (a worker with the role prefill)",
    )
    max_queue: int = Field(128, ge=0, description="requests waiting per worker beyond its rows")
    max_wait_s: float = Field(30.0, gt=0, description="refuse when the queue would take longer than this")
    max_connections: int = Field(10_000, ge=1, description="WebSockets open at once")
    max_prompt_chars: int = Field(1 << 20, ge=1, description="longest text of a request")
    max_n: int = Field(8, ge=1, le=128, description="most answers to one request (n)")
    request_deadline_s: float = Field(
        300.0, gt=0, le=86400, description="wall clock of one request, queueing included; a day at most"
    )
    body_timeout_s: float = Field(30.0, gt=0, description="how long a body may take to arrive")
    idle_timeout_s: float = Field(30.0, gt=0, description="a connection without a complete request header")
    drain_notice_s: float = Field(
        0.0, ge=0, description="after SIGTERM: not ready, but serving for so long, so that balancers notice"
    )
    drain_deadline_s: float = Field(25.0, ge=0, description="how long streams may go on after SIGTERM")
    write_buffer_bytes: ByteSize = Field(
        ByteSize(256 << 10), ge=4 << 10, description="unread output kept for one client"
    )
    life_sign_s: float = Field(
        10.0, ge=0.05, description="a stream that waits says so at least this often: a comment, a ping"
    )
    slow_client_s: float = Field(10.0, gt=0, description="a client that reads nothing for so long is cut off")
    native: bool = Field(
        True,
        description="write tokens from a compiled loop where a C compiler, or a library that was compiled before, is at hand; "
        "off: from Python",
    )
    resume_window_s: float = Field(
        30.0, ge=0, description="how long a resumable stream waits for its client; 0: none is resumable"
    )
    resume_bytes: ByteSize = Field(
        ByteSize(1 << 20), ge=4 << 10, description="last events held of one resumable stream"
    )
    resume_total_bytes: ByteSize = Field(
        ByteSize(64 << 20),
        ge=4 << 10,
        description="the same of all together; who holds most of them makes room for other tenants",
    )

    image_processes: int = Field(
        0,
        ge=0,
        le=64,
        description="decode and resize pictures, some 40 a second each at 700 × 500 pixels; 0: a quarter of the "
        "cores, 2 to 8",
    )
    max_image_bytes: ByteSize = Field(
        ByteSize(16 << 20), ge=1 << 10, description="largest picture as it is sent"
    )
    max_image_pixels: int = Field(64_000_000, ge=1, description="largest picture once decoded")
    min_image_side: int = Field(4, ge=1, description="smaller pictures are refused, pixels")
    image_timeout_s: float = Field(10.0, gt=0, description="decoding one picture")
    image_memory_bytes: ByteSize = Field(
        ByteSize(2 << 30), ge=256 << 20, description="address space of a process that decodes pictures"
    )

    admin_listen: str | None = Field(
        None, description="<host>:<port> of the operator's own routes (drain, keys, workers); none: off"
    )
    admin_token_file: str | None = Field(None, description="file with the token that these routes want")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_json: bool | None = Field(None, description="JSON lines; none: where stderr is no terminal")
    otlp_endpoint: str | None = Field(
        None, description="OpenTelemetry collector for traces, http://host:4318; none: no tracing"
    )
    vllm_metrics: bool = Field(
        False,
        description="also export the names that vLLM dashboards and Kubernetes' inference gateways expect",
    )

    @field_validator("image_processes")
    @classmethod
    def _count_cores(cls, value: int) -> int:
        return value or default_image_processes()

    @field_validator("grpc_port", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return None if value in (-1, "-1") else value

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _read_aliases(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value or "{}")
        except json.JSONDecodeError:
            raise ValueError('not JSON such as {"other name": "model id"}') from None

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
            if not _WORKERS.fullmatch(endpoint):
                raise ValueError(
                    f"{endpoint!r} is not ipc://<path>, tcp://<host>:<port>, dns://<name>:<port>, file:///<path> or "
                    f"http://<host>:<port>/<path>"
                )
        if len(set(value)) != len(value):
            raise ValueError("the same endpoint is given twice")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", value):
            raise ValueError(f"{value!r} is not http://<host>:<port>, such as http://127.0.0.1:4318")
        return value

    @field_validator("admin_listen")
    @classmethod
    def _check_admin(cls, value: str | None) -> str | None:
        if value is not None and not _ADDRESS.fullmatch(value):
            raise ValueError(f"{value!r} is not <host>:<port>, such as 127.0.0.1:9090")
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
        return tuple(map(read_origin, value))

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in value:
            if len(key.get_secret_value()) < 8:
                raise ValueError("a key is shorter than 8 characters")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> GatewayConfig:
        if self.max_unfinished_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_unfinished_bytes {self.max_unfinished_bytes} must hold one body: at least {self.max_body_bytes}"
            )
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

    def admin_address(self) -> tuple[str, int]:
        """Where the operator's routes listen; `admin_listen` is set."""
        host, _, port = (self.admin_listen or "").rpartition(":")
        return host.strip("[]"), int(port)

    def key_texts(self) -> tuple[str, ...]:
        """The API keys in the clear. Never log them."""
        return tuple(key.get_secret_value() for key in self.api_keys)


GATEWAY_SETTINGS: Final = Section(
    "gateway",
    GatewayConfig,
    groups={
        "host": "where it listens",
        "workers": "the workers behind it",
        "api_keys": "who may call",
        "max_body_bytes": "how much it takes",
        "image_processes": "pictures",
        "admin_listen": "the operator's routes",
        "log_level": "what it tells",
    },
)


def load(flags: Mapping[str, object] | None = None, file: Path | None = None) -> GatewayConfig:
    """Parse flags, then environment, then the file, then defaults. Raises `ConfigError`."""
    return GATEWAY_SETTINGS.load(flags or {}, os.environ, file)
