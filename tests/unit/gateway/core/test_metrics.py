"""What `/metrics` and `/readyz` say, as Prometheus reads it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.protocol import HISTOGRAM_BUCKETS_S
from tests.fake_worker import FakeWorker
from tests.gateway_thread import GatewayThread
from tests.http_client import ask


def samples(gateway: GatewayThread) -> dict[str, float]:
    """Every sample by name and labels."""
    text = ask(gateway.url, "/metrics").body.decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_requests_tokens_and_times_are_counted(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.reply("12345")
    ask(gateway.url, "/v1/query", {"question": "a"})
    ask(gateway.url, "/v1/query", {"question": "b", "settings": {"max_tokens": 2}})
    ask(gateway.url, "/v1/query", {"question": ""})
    told = samples(gateway)
    assert told["degas_requests_accepted_total{model=fake-vl}"] == 2
    assert told["degas_requests_ended_total{reason=stop}"] == 1
    assert told["degas_requests_ended_total{reason=length}"] == 1
    assert told["degas_generation_tokens_total{}"] == 7
    assert told["degas_http_responses_total{route=/v1/query,status=400}"] == 1
    assert told["degas_time_to_first_token_seconds_count{}"] == 2
    assert told["degas_inter_token_latency_seconds_count{}"] == 5
    assert told["degas_requests_in_flight{}"] == 0
    assert not [name for name in told if name.startswith("vllm:")]


def test_the_workers_own_figures_come_with_its_beats(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.beat_metrics = {
        "bubble_seconds_total": 1.5,
        "depth": 2.0,
        "finished_total|stop": 3.0,
        "finished_total|length": 4.0,
        'bad name"} 1\nx': 1.0,
        "": 1.0,
    }
    worker.beat_histograms = {
        "step_host": [*([1.0] * len(HISTOGRAM_BUCKETS_S)), 2.0, 9.5],
        "wrong_length": [1.0],
    }
    link = gateway.gateway.service.workers[0].link
    gateway.wait_for(lambda: link.beat is not None and "depth" in link.beat.metrics)
    told = samples(gateway)
    assert told["degas_worker_bubble_seconds_total{worker=0}"] == 1.5
    assert told["degas_worker_depth{worker=0}"] == 2
    assert told["degas_worker_finished_total{kind=stop,worker=0}"] == 3
    assert told["degas_worker_step_host_seconds_count{worker=0}"] == 2
    assert told["degas_worker_step_host_seconds_sum{worker=0}"] == 9.5
    assert told["degas_worker_up{worker=0}"] == 1


def test_vllm_names_on_request(worker: FakeWorker) -> None:
    with GatewayThread(workers=[worker.endpoint], vllm_metrics=True) as gateway:
        gateway.wait_ready()
        worker.beat_metrics = {"prefix_cache_queries_total": 8.0, "prefix_cache_hits_total": 6.0}
        link = gateway.gateway.service.workers[0].link
        gateway.wait_for(lambda: link.beat is not None and bool(link.beat.metrics))
        ask(gateway.url, "/v1/query", {"question": "a"})
        gateway.wait_for(lambda: link.beat is not None and link.beat.num_running == 0)
        told = samples(gateway)
    assert told["vllm:num_requests_running{model_name=fake-vl}"] == 0
    assert told["vllm:kv_cache_usage_perc{model_name=fake-vl}"] == 0
    assert told["vllm:cache_config_info{block_size=16,num_gpu_blocks=1024}"] == 1
    assert told["vllm:prefix_cache_hits_total{model_name=fake-vl}"] == 6
    assert told["vllm:request_success_total{finished_reason=stop,model_name=fake-vl}"] == 1
    assert told["vllm:e2e_request_latency_seconds_count{model_name=fake-vl}"] == 1


def test_a_draining_worker_gets_no_new_work(gateway: GatewayThread, worker: FakeWorker) -> None:
    worker.draining = True
    gateway.wait_for(lambda: not gateway.gateway.service.readiness()[0])
    assert ask(gateway.url, "/readyz").status == 503
    assert ask(gateway.url, "/v1/query", {"question": "a"}).status == 503


@pytest.mark.parametrize("draining", [False, True])
def test_a_worker_that_was_asked_to_stop_is_not_lost(draining: bool) -> None:
    """An alert counts the lost; restarting workers one by one must page nobody."""
    with FakeWorker() as worker, GatewayThread(workers=[worker.endpoint]) as gateway:
        gateway.wait_ready()
        link = gateway.gateway.service.workers[0].link
        worker.draining = draining
        gateway.wait_for(lambda: link.beat is not None and link.beat.draining is draining)
        worker.die()
        gateway.wait_for(lambda: link.ready is None)
        assert gateway.gateway.service.metrics.num_workers_lost == (0 if draining else 1)


def test_a_trace_is_passed_through(gateway: GatewayThread) -> None:
    assert ask(gateway.url, "/debug/trace?steps=5").json == {"traceEvents": []}
    assert ask(gateway.url, "/debug/trace?steps=0").status == 400
