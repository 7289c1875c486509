"""Owns what is asked and what there is: a load, a cluster, and each stage's capacity in closed form. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.capacity.costs import Costs
from loadtest.capacity.members import PAGE_TOKENS, TURNOVER_STEPS

MOST_MEMBERS = 100_000


@dataclass(frozen=True, slots=True)
class Load:
    """What arrives: Poisson, each request with a prompt, an answer and perhaps a picture that no worker has seen."""

    rate: float  # requests a second
    prompt_tokens: float = 30.0  # beside a picture's
    output_tokens: float = 30.0  # mean
    picture_share: float = 0.0  # of the requests
    crops: float = 2.0  # of a picture
    fixed_lengths: bool = False  # answers all of the same length; else geometric with that mean

    def check(self) -> None:
        """Raises ValueError naming the option and a value that would work."""
        bounds = {
            "rate": (0.001, 1e6, 10),
            "prompt_tokens": (1, 1e6, 30),
            "output_tokens": (1, 1e5, 30),
            "picture_share": (0, 1, 0.5),
            "crops": (1, 100, 2),
        }
        for name, (low, high, safe) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is {value:g}; {low:g} to {high:g} would work, such as {safe:g}")


@dataclass(frozen=True, slots=True)
class Cluster:
    """How many of what. Either `workers`, which do everything, or `prefills` and `decodes`; `encoders` beside either.

    `queue` is how many requests may wait for one decoding worker beyond its rows.
    """

    gateways: int = 1
    workers: int = 0
    encoders: int = 0
    prefills: int = 0
    decodes: int = 0
    queue: int = 128

    def check(self) -> None:
        """Raises ValueError naming the option and what would work."""
        for name in ("gateways", "workers", "encoders", "prefills", "decodes"):
            value = getattr(self, name)
            if not (name == "gateways") <= value <= MOST_MEMBERS:
                raise ValueError(
                    f"--{name} is {value}; {int(name == 'gateways')} to {MOST_MEMBERS} would work"
                )
        if not 0 <= self.queue <= 1_000_000:
            raise ValueError(f"--queue is {self.queue}; 0 to 1000000 would work, such as 128")
        if self.workers and (self.prefills or self.decodes):
            raise ValueError("--workers do everything: give either them, or --prefills and --decodes")
        if not self.workers and not (self.prefills and self.decodes):
            raise ValueError("there is nobody to decode: give --workers, or --prefills and --decodes")

    @property
    def is_split(self) -> bool:
        """Whether prompts are computed apart from decoding."""
        return bool(self.prefills)

    @property
    def num_decoding(self) -> int:
        """Workers that decode."""
        return self.workers or self.decodes


@dataclass(frozen=True, slots=True)
class Stage:
    """One kind of member: what it could do at most, and what it would be asked."""

    name: str
    members: int
    capacity: float  # requests a second that all of them could serve together
    unit: str  # what is counted when it is full

    def use(self, rate: float) -> float:
        """The share of its capacity that this rate takes; above 1 it breaks."""
        return rate / self.capacity if self.capacity else float("inf")


def context_of(load: Load, costs: Costs) -> float:
    """Positions of a mean sequence at its end: what its pages are counted by."""
    return load.prompt_tokens + load.picture_share * costs.device.picture_tokens + load.output_tokens


def prompt_of(load: Load, costs: Costs, *, has_picture: bool) -> float:
    """Prompt positions of a request."""
    return load.prompt_tokens + (costs.device.picture_tokens if has_picture else 0)


def stages(load: Load, cluster: Cluster, costs: Costs) -> list[Stage]:
    """Every stage with its capacity by itself, were all others endless: the smallest one is what breaks first.

    A worker's rows are full at its capacity: each step then takes step(rows) and, where it also prefills, what the
    prompts that come in meanwhile take. A row is taken for a step a token (the first token's is shared with its prompt) and
    for `TURNOVER_STEPS` until it is another's. So a request costs a worker (output + 1.5) · step(rows) / rows + prefill + encoder.
    """
    device, gateway, share = costs.device, costs.gateway, load.picture_share
    gateway_s = (gateway.request_us + load.output_tokens * gateway.token_us) / 1e6
    found = [Stage("gateways", cluster.gateways, _per_s(cluster.gateways, gateway_s), "processor time")]
    if share and gateway.picture_ms:
        count = cluster.gateways * gateway.image_processes
        found.append(
            Stage("image processes", count, count / (share * gateway.picture_ms / 1e3), "processor time")
        )
    encode_s = share * device.encode_s(load.crops)
    prefill_s = device.prefill_s(load.prompt_tokens + share * device.picture_tokens)
    on_decoder_s = 0.0
    if cluster.encoders:
        if encode_s:
            found.append(Stage("encoders", cluster.encoders, cluster.encoders / encode_s, "device time"))
    else:
        on_decoder_s += encode_s
    if cluster.is_split:
        own_s = prefill_s + on_decoder_s
        if own_s:
            found.append(Stage("prefills", cluster.prefills, cluster.prefills / own_s, "device time"))
        on_decoder_s = device.prefill_s(min(PAGE_TOKENS, load.prompt_tokens))
    else:
        on_decoder_s += prefill_s
    rows = device.rows(context_of(load, costs))
    name = "decodes" if cluster.is_split else "workers"
    if not rows:
        found.append(Stage(name, cluster.num_decoding, 0.0, "memory: not one sequence fits"))
        return found
    steps = load.output_tokens + TURNOVER_STEPS
    per_request_s = steps * device.step_s(rows) / rows + on_decoder_s
    unit = "rows, by memory" if rows < device.max_rows else "rows"
    found.append(Stage(name, cluster.num_decoding, _per_s(cluster.num_decoding, per_request_s), unit))
    return found


def _per_s(members: int, seconds: float) -> float:
    return members / seconds if seconds else float("inf")


def breaks_first(found: list[Stage]) -> Stage:
    """The stage with the smallest capacity."""
    return min(found, key=lambda stage: stage.capacity)


def erlang_c(servers: int, offered: float) -> float:
    """The chance to wait in M/M/c with `offered` = λ/μ < servers (Erlang 1917), by its recursion; 1 where it is full."""
    if offered >= servers:
        return 1.0
    blocking = 1.0  # Erlang B, which does not overflow
    for count in range(1, servers + 1):
        blocking = offered * blocking / (count + offered * blocking)
    return blocking / (1 - offered / servers * (1 - blocking))


def mean_wait_s(rate: float, service_s: float, servers: int) -> float:
    """The mean wait in M/M/c; infinite where it is full."""
    spare = servers / service_s - rate
    return erlang_c(servers, rate * service_s) / spare if spare > 0 else float("inf")
