"""What routers, autoscalers and dashboards see of a real gateway and a real worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from tests.deploy.manifests import DEPLOY, FILES, expressions, metrics_in, selected_labels
from tests.http_client import Opened, ask
from tests.integration.scraped import Scraped, scrape
from tests.integration.stack import SIM, Stack, stack, until
from tests.unit.worker.wire.plain_msgpack import read
from tests.unit.worker.wire.router_view import RouterView

pytestmark = pytest.mark.slow

PAGE_TOKENS = 16
TOPIC = "kv@10.0.0.7@sim"
END = b"\xff" * 8


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("events")
    flags = [*SIM, "--kv-events", f"ipc://{folder}/kv", "--kv-events-replay", f"ipc://{folder}/replay"]
    flags += ["--kv-events-topic", TOPIC, "--price-per-hour", "1"]
    with stack(flags, vllm_metrics="true", image_processes="1") as running:
        yield running


class Router:
    """Follows a worker's events as a prefix-aware router does: subscribed, and asking again for what it has not heard."""

    def __init__(self, running: Stack) -> None:
        flag = running.worker_flags.index
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.subscriber = self.context.socket(zmq.SUB)
        self.subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
        self.subscriber.connect(running.worker_flags[flag("--kv-events") + 1])
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.connect(running.worker_flags[flag("--kv-events-replay") + 1])
        for socket in (self.subscriber, self.replay):
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.view = RouterView()

    def catch_up(self) -> None:
        """Ask for everything that was not heard yet."""
        self.replay.send_multipart([b"", len(self.view.times).to_bytes(8, "big")])
        while True:
            _, number, payload = self.replay.recv_multipart()
            if number == END:
                return
            assert int.from_bytes(number, "big") == len(self.view.times)
            self.view.on_payload(payload)

    def close(self) -> None:
        self.subscriber.close(0)
        self.replay.close(0)
        self.context.term()


@pytest.fixture
def router(served: Stack) -> Iterator[Router]:
    made = Router(served)
    yield made
    made.close()


def chat(running: Stack, text: str, max_tokens: int = 4) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "ignore_eos": True}
    answer = ask(running.url, "/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return answer.json


def prompt_ids(running: Stack, text: str) -> list[int]:
    answer = ask(running.url, "/tokenize", {"messages": [{"role": "user", "content": text}]})
    assert answer.status == 200, answer.body
    return list(answer.json["tokens"])


def test_a_router_knows_which_prompt_is_cached(served: Stack, router: Router) -> None:
    """Before the question nothing of it, afterwards all its full pages, and the worker finds as much in its cache."""
    text = "which of these pages will be found again? " * 6
    ids = prompt_ids(served, text)
    assert len(ids) > 3 * PAGE_TOKENS
    router.catch_up()
    assert router.view.prefix_of(ids, PAGE_TOKENS) == 0
    chat(served, text)
    router.catch_up()
    known = router.view.prefix_of(ids, PAGE_TOKENS)
    assert known == len(ids) // PAGE_TOKENS * PAGE_TOKENS
    usage = chat(served, text)["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["prompt_tokens_details"]["cached_tokens"] == (len(ids) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert usage["prompt_tokens_details"]["cached_tokens"] <= known


def test_a_subscriber_hears_it_as_it_happens(served: Stack, router: Router) -> None:
    """In the order of numbers, under the topic that says whose events these are."""
    router.catch_up()
    for attempt in range(50):
        chat(served, f"subscribers may come late, number {attempt}: " + "word " * 40)
        if router.subscriber.poll(100):
            break
    topic, number, payload = router.subscriber.recv_multipart()
    assert topic == TOPIC.encode()
    heard = int.from_bytes(number, "big")
    assert heard >= len(router.view.times)
    router.catch_up()
    batch: Any = read(payload)
    assert batch[0] == router.view.times[heard], "what is repeated is what was said"


# ---------------------------------------------------------------------- metrics

SCRAPER_LABELS = {"instance", "job", "namespace", "le"}  # what Prometheus adds, or histograms have
PICKER = {  # what the inference gateway's endpoint picker asks model servers for, by its defaults
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_running": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
}


@pytest.fixture(scope="module")
def figures(served: Stack) -> Scraped:
    """After answers, an error and a refused request; the worker's heartbeat has told of them."""
    chat(served, "count me")
    assert ask(served.url, "/v1/chat/completions", {"messages": "none"}).status == 400
    until(lambda: _has_ended(scrape(served.url)))
    return scrape(served.url)


def _has_ended(seen: Scraped) -> bool:
    return "degas_worker_finished_total" in seen.names and seen.value("degas_worker_num_running") == 0


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_what_dashboards_alerts_and_autoscalers_ask_for_is_there(
    figures: Scraped, where: str, expression: str
) -> None:
    """Every metric that deploy/ names is scraped from a real server, or is recorded by its rules of such."""
    recorded = {
        record for place, _ in expressions() if (record := place.removeprefix("rules.yml ")) in expression
    }
    missing = metrics_in(expression) - figures.names - recorded
    assert not missing
    for name, label in selected_labels(expression):
        if name in figures.samples and label not in SCRAPER_LABELS:
            assert label in figures.labels(name), f"{name} has no label {label}"


def test_the_documents_name_metrics_that_are_there(figures: Scraped) -> None:
    """docs/operating.md and the manifests' comments; a name that ends in … or _ stands for several."""
    lines = (DEPLOY.parent / "docs" / "operating.md").read_text().splitlines()
    texts = ["\n".join(line for line in lines if "GPU:" not in line), *(path.read_text() for path in FILES)]
    recorded = {place.removeprefix("rules.yml ") for place, _ in expressions()}
    external = {"degas_requests_at_workers", "degas_pages_in_use"}  # the adapter's names for two queries
    named = set().union(*map(metrics_in, texts)) - recorded - external
    missing = {
        name
        for name in named
        if not any(known == name or known.startswith(name.rstrip("_") + "_") for known in figures.names)
    }
    # These need a file of keys, a machine that measures energy, and workers that encode or compute prompts for others.
    elsewhere = ("degas_key_", "degas_worker_energy_", "degas_worker_encode", "degas_worker_prefills_")
    assert not {name for name in missing if not name.startswith(elsewhere)}


def test_the_endpoint_picker_finds_what_it_asks_for(figures: Scraped, served: Stack) -> None:
    for name, kind in PICKER.items():
        assert figures.types[name] == kind
    ((labels, value),) = figures.samples["vllm:cache_config_info"]
    assert value == 1 and labels["block_size"] == str(PAGE_TOKENS)
    assert int(labels["num_gpu_blocks"]) == figures.value("degas_worker_total_pages")
    assert not [name for name in figures.names if "lora" in name], "there are no adapters to tell of"


def test_the_endpoint_pickers_figures_follow_what_runs(served: Stack) -> None:
    """More requests than rows: some run, as many as have room, the others wait, and KV memory fills."""
    rows = 32
    body = {"messages": [{"role": "user", "content": "go on " * 30}], "max_tokens": 4000, "ignore_eos": True}
    streams: list[Opened] = []
    try:
        asked = {**body, "stream": True}
        streams += [Opened(served.url, "/v1/chat/completions", asked) for _ in range(rows + 3)]

        def is_full() -> bool:
            now = scrape(served.url)
            running, waiting = (now.value(f"vllm:num_requests_{what}") for what in ("running", "waiting"))
            is_shared = 0 < running <= rows and waiting >= 3 and running + waiting == rows + 3
            return is_shared and 0 < now.value("vllm:kv_cache_usage_perc") <= 1

        until(is_full)
    finally:
        for stream in streams:
            stream.close()

    def is_empty() -> bool:
        now = scrape(served.url)
        names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
        return not any(now.value(f"vllm:{name}") for name in names)

    until(is_empty)
