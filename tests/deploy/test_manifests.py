"""The example manifests: objects that Kubernetes takes, that fit together, and that say to Degas what Degas understands."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import jsonschema
import pytest
import yaml

from gateway.config import GATEWAY_SETTINGS, GatewayConfig
from shared.settings import File, Section
from tests.deploy.crds import SPECS, schema_of
from tests.deploy.manifests import FILES, Object, deployments, objects, of_kind
from worker.config import WORKER_SETTINGS, WorkerConfig

SECTIONS: dict[str, Section[Any]] = {"gateway": GATEWAY_SETTINGS, "worker": WORKER_SETTINGS}
POOL = "inference-pool.yaml"
KEYS: list[str] = re.findall(
    r"create secret generic api-keys --from-literal=keys=(\S+)", "".join(p.read_text() for p in FILES)
)


@pytest.mark.parametrize("one", objects(), ids=str)
@pytest.mark.parametrize("version", ["1.29", "1.37"])  # the first with sidecars, and a new one
def test_kubernetes_takes_it(one: Object, version: str) -> None:
    """By Kubernetes' own schemas, unknown fields refused; custom resources by ours."""
    schema = schema_of(one.fields["apiVersion"], one.kind)
    if schema is not None:
        jsonschema.Draft202012Validator(schema).validate(one.fields)
        return
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(deepcopy(one.fields), version, strict=True)


@pytest.mark.parametrize("one", [o for o in objects() if (o.fields["apiVersion"], o.kind) in SPECS], ids=str)
def test_our_schemas_refuse_what_is_not_there(one: Object) -> None:
    """A misspelt field, a missing one and a wrong type at any depth of the example."""
    schema = schema_of(one.fields["apiVersion"], one.kind)
    assert schema is not None
    validator = jsonschema.Draft202012Validator(schema)
    num_wrong = 0
    for wrong in _spoilt(one.fields["spec"]):
        assert not validator.is_valid({**one.fields, "spec": wrong}), wrong
        num_wrong += 1
    assert num_wrong > 3


def _spoilt(value: Any) -> list[Any]:
    """The value with one thing wrong in it: each object once with a field more, each list once not a list."""
    found: list[Any] = []
    if isinstance(value, dict):
        free = "app" in value  # labels have any name
        found += [] if free else [{**value, "unheardOf": 1}]
        for key, inner in value.items():
            found += [{**value, key: wrong} for wrong in _spoilt(inner)]
    elif isinstance(value, list):
        found.append("not a list")
        found += [[wrong, *value[1:]] for wrong in _spoilt(value[0])]
    return found


def test_the_files_are_what_the_directory_holds() -> None:
    assert {path.name for path in FILES} == {
        "autoscale-hpa.yaml",
        "autoscale.yaml",
        "degas.yaml",
        "encoder-cpu.yaml",
        "encoder-gpu.yaml",
        "inference-pool.yaml",
        "monitoring.yaml",
        "worker-cpu.yaml",
        "worker-gpu.yaml",
    }


def test_no_name_is_used_twice_by_files_that_go_together() -> None:
    seen = [(o.kind, o.name, o.fields["metadata"].get("namespace")) for o in objects()]
    twice = {key for key in seen if seen.count(key) > 1}
    assert not twice


# ---------------------------------------------------------------------- pods


@pytest.mark.parametrize("one", deployments(), ids=str)
def test_settings_are_ones_that_degas_knows(one: Object) -> None:
    """Every variable is a setting and has a value it takes, all of a container's together."""
    for container in one.containers:
        role = container["name"]
        section = SECTIONS[role]
        given = {}
        for variable in container["env"]:
            if variable["name"].startswith("DEGAS_"):
                given[variable["name"]] = _value(variable)
            else:
                assert variable["name"] == "POD_IP"
        config = section.parse(section.gather({}, given, File()))
        assert isinstance(config, GatewayConfig if role == "gateway" else WorkerConfig)


def _value(variable: dict[str, Any]) -> str:
    if "value" in variable:
        return str(variable["value"]).replace("$(POD_IP)", "10.0.0.7")
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "api-keys", "key": "keys"}
    return KEYS[0]


def test_the_secret_that_they_say_to_make_holds_two_keys() -> None:
    assert len(KEYS) == 2
    for text in KEYS:
        given = {"DEGAS_GATEWAY_API_KEYS": text}
        config = GATEWAY_SETTINGS.parse(GATEWAY_SETTINGS.gather({}, given, File()))
        assert [key.get_secret_value() for key in config.api_keys] == ["sk-change-me", "sk-another"]


def test_what_refers_to_a_variable_stands_behind_it() -> None:
    """Kubernetes puts in only variables that were named before."""
    for one in deployments():
        for container in one.containers:
            names: list[str] = []
            for variable in container["env"]:
                assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= set(names)
                names.append(variable["name"])


@pytest.mark.parametrize("one", deployments(), ids=str)
def test_pods_are_confined(one: Object) -> None:
    """Kubernetes' "restricted" standard, a read-only root, and nothing that the pod does not need."""
    pod = one.pod
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "variables of Services look like settings"
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in one.containers:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]) == {"requests", "limits"}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounts and set(mounts.values()) <= volumes
        for variable in container["env"]:
            if variable["name"].endswith("CURVE_KEY_DIR"):
                assert variable["value"] in mounts
        for argument in container.get("args", []):
            if argument.startswith("/"):
                assert argument.rpartition("/")[0] in mounts


@pytest.mark.parametrize("one", deployments(), ids=str)
def test_probes_ask_what_is_there(one: Object) -> None:
    for container in one.containers:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
        assert "startupProbe" in probes
        assert "readinessProbe" in probes or container.get("restartPolicy") == "Always"
        for name, probe in probes.items():
            if "exec" in probe:
                command = probe["exec"]["command"]
                assert command[:4] == ["python", "-m", "degas.health", "file"]
                assert command[4] == container["args"][container["args"].index("--status-file") + 1]
                assert probe["timeoutSeconds"] < probe["periodSeconds"]
                assert name != "livenessProbe", "the supervisor replaces what hangs"
            else:
                assert probe["httpGet"]["port"] in ports
                wanted = "/readyz" if name == "readinessProbe" else "/healthz"
                assert probe["httpGet"]["path"] == wanted, (
                    "a liveness probe that asks for workers kills gateways"
                )


@pytest.mark.parametrize("one", deployments(), ids=str)
def test_there_is_time_to_drain(one: Object) -> None:
    """A pod is not killed before what it was given to drain with is over."""
    grace_s = one.pod["terminationGracePeriodSeconds"]
    for container in one.containers:
        given = {v["name"]: v.get("value", "") for v in container["env"]}
        if container["name"] == "gateway":
            notice_s = float(given["DEGAS_GATEWAY_DRAIN_NOTICE_S"])
            assert notice_s > one_probe_s(container), "balancers must have noticed"
            assert grace_s > notice_s + float(given["DEGAS_GATEWAY_DRAIN_DEADLINE_S"])
        elif "--worker-grace-s" in container["args"]:
            assert grace_s > float(container["args"][container["args"].index("--worker-grace-s") + 1])


def one_probe_s(container: Any) -> float:
    return float(container["readinessProbe"]["periodSeconds"])


def test_a_pools_worker_outlives_its_gateway() -> None:
    """As a sidecar: what always restarts among the init containers is stopped after the others."""
    (pool,) = (one for one in deployments() if one.file == POOL)
    (sidecar,) = pool.pod["initContainers"]
    assert sidecar["name"] == "worker" and sidecar["restartPolicy"] == "Always"
    endpoint = {v["name"]: v.get("value") for v in sidecar["env"]}["DEGAS_WORKER_ENDPOINT"]
    (gateway,) = pool.pod["containers"]
    assert {v["name"]: v.get("value") for v in gateway["env"]}["DEGAS_GATEWAY_WORKERS"] == endpoint
    folder = endpoint.removeprefix("ipc://").rpartition("/")[0]
    named = {m["name"] for c in pool.containers for m in c["volumeMounts"] if m["mountPath"] == folder}
    assert len(named) == 1, "both see the socket's folder"


def one_called(name: str) -> Object:
    return next(one for one in deployments() if one.name == name)


def settings_of(one: Object) -> dict[str, str]:
    return {v["name"]: v["value"] for v in one.containers[0]["env"]}


@pytest.mark.parametrize("what", ["worker", "encoder"])
def test_cpu_and_gpu_workers_differ_only_where_they_must(what: str) -> None:
    cpu, gpu = (one_called(f"{what}-{kind}") for kind in ("cpu", "gpu"))
    assert cpu.labels["app"] == gpu.labels["app"] == "degas-worker"
    assert gpu.containers[0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings_of(cpu)["DEGAS_WORKER_THREADS"] == cpu.containers[0]["resources"]["limits"]["cpu"]
    for key in ("startupProbe", "readinessProbe", "securityContext", "volumeMounts", "ports", "args"):
        assert cpu.containers[0][key] == gpu.containers[0][key]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_an_encoder_is_its_worker_in_another_role(kind: str) -> None:
    """The same model, dtype and quantize, or its features are of no use; and nothing that only requests need."""
    worker, encoder = one_called(f"worker-{kind}"), one_called(f"encoder-{kind}")
    assert settings_of(worker)["DEGAS_WORKER_ROLE"] == "decode"
    assert settings_of(encoder) == {
        name: "encode" if name == "DEGAS_WORKER_ROLE" else value
        for name, value in settings_of(worker).items()
        if name != "DEGAS_WORKER_KV_BYTES"
    }
    for key in worker.containers[0].keys() - {"env"}:
        assert encoder.containers[0][key] == worker.containers[0][key]


# ---------------------------------------------------------------------- what refers to what


def matching(selector: dict[str, str], file: str) -> list[Object]:
    """Deployments whose pods a selector takes, of those that are applied with this file."""
    alone = file == POOL
    return [
        one for one in deployments() if (one.file == POOL) is alone and selector.items() <= one.labels.items()
    ]


def test_deployments_select_their_own_pods() -> None:
    for one in deployments():
        assert one.spec["selector"]["matchLabels"] == one.labels
        assert not [o for o in deployments() if o is not one and one.labels.items() <= o.labels.items()]


@pytest.mark.parametrize("one", [*of_kind("Service"), *of_kind("PodDisruptionBudget")], ids=str)
def test_services_and_budgets_have_pods(one: Object) -> None:
    selector = one.spec["selector"]
    pods = matching(selector.get("matchLabels", selector), one.file)
    assert pods
    for port in one.spec.get("ports", []):
        for pod in pods:
            named = {p["name"]: p["containerPort"] for c in pod.containers for p in c["ports"]}
            target = port.get("targetPort", port["port"])
            assert target in named or target in named.values()


def test_every_deployment_has_a_budget() -> None:
    covered = [pod for one in of_kind("PodDisruptionBudget") for pod in matching(_labels(one), one.file)]
    assert {str(pod) for pod in covered} == {str(one) for one in deployments()}


def _labels(one: Object) -> dict[str, str]:
    return dict(one.spec["selector"]["matchLabels"])


def test_gateways_look_for_workers_at_a_headless_service() -> None:
    gateway = next(one for one in deployments() if one.name == "gateway")
    workers = {v["name"]: v.get("value") for v in gateway.containers[0]["env"]}["DEGAS_GATEWAY_WORKERS"]
    name, _, port = workers.removeprefix("dns://").partition(":")
    service = next(one for one in of_kind("Service") if one.name == name)
    assert service.spec["clusterIP"] == "None" and service.spec["publishNotReadyAddresses"]
    assert [one["port"] for one in service.spec["ports"]] == [int(port)]
    assert len(matching(service.spec["selector"], service.file)) == 4, "CPU and GPU, workers and encoders"


@pytest.mark.parametrize("one", of_kind("NetworkPolicy"), ids=str)
def test_policies_name_ports_that_pods_have(one: Object) -> None:
    pods = matching(one.spec["podSelector"]["matchLabels"], one.file)
    assert pods
    for rule in one.spec["ingress"]:
        for port in rule["ports"]:
            for pod in pods:
                assert port["port"] in {p["name"] for c in pod.containers for p in c["ports"]}


def test_only_the_picker_hears_kv_events() -> None:
    policy = next(one for one in of_kind("NetworkPolicy") if one.file == POOL)
    open_to_all = {p["port"] for rule in policy.spec["ingress"] if "from" not in rule for p in rule["ports"]}
    assert open_to_all == {"http"}


@pytest.mark.parametrize("one", [*of_kind("HorizontalPodAutoscaler"), *of_kind("ScaledObject")], ids=str)
def test_autoscalers_scale_what_is_there(one: Object) -> None:
    target = one.spec["scaleTargetRef"]
    assert target["apiVersion"] == "apps/v1"
    assert target["name"] in {o.name for o in deployments()}
    least, most = (one.spec.get(f"{end}Replica{kind}") for end in ("min", "max") for kind in ("s", "Count") if f"{end}Replica{kind}" in one.spec)  # fmt: skip
    assert 1 <= least < most


def test_both_autoscalers_of_workers_ask_the_same() -> None:
    """KEDA's queries, and those of the adapter's rules under the names that the other one asks for."""
    (scaled,) = of_kind("ScaledObject")
    (rules,) = of_kind("ConfigMap")
    hpa = next(one for one in of_kind("HorizontalPodAutoscaler") if one.file == "autoscale-hpa.yaml")
    adapter = {
        rule["name"]["as"]: rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="degas"')
        for rule in yaml.safe_load(rules.fields["data"]["config.yaml"])["externalRules"]
    }
    asked = {
        m["external"]["metric"]["name"]: m["external"]["target"]["averageValue"] for m in hpa.spec["metrics"]
    }
    assert asked.keys() == adapter.keys()
    queries = {t["metadata"]["query"]: float(t["metadata"]["threshold"]) for t in scaled.spec["triggers"]}
    assert {adapter[name]: _quantity(value) for name, value in asked.items()} == queries
    assert hpa.spec["behavior"] == scaled.spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]


def _quantity(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def test_the_pools_route_leads_to_its_pods() -> None:
    (pool,), (route,) = of_kind("InferencePool"), of_kind("HTTPRoute")
    (backend,) = route.spec["rules"][0]["backendRefs"]
    assert (backend["group"], backend["kind"], backend["name"]) == (
        pool.fields["apiVersion"].partition("/")[0],
        pool.kind,
        pool.name,
    )
    (pods,) = matching(pool.spec["selector"]["matchLabels"], pool.file)
    ports = {p["containerPort"] for p in pods.pod["containers"][0]["ports"]}
    assert {port["number"] for port in pool.spec["targetPorts"]} == ports
    deadline_s = GatewayConfig().request_deadline_s
    assert float(route.spec["rules"][0]["timeouts"]["request"].rstrip("s")) > deadline_s


def test_monitored_pods_are_all_that_have_metrics() -> None:
    (monitor,) = of_kind("PodMonitor")
    (expression,) = monitor.spec["selector"]["matchExpressions"]
    serving = {one.labels["app"] for one in deployments() for c in one.containers if c["name"] == "gateway"}
    assert set(expression["values"]) == serving
    for endpoint in monitor.spec["podMetricsEndpoints"]:
        assert endpoint["port"] == "http" and endpoint["path"] == "/metrics"
