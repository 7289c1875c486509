"""Small schemas of the custom resources that the examples use, written from their published definitions.

They know the fields that stand in the examples, with the definitions' types, bounds and names, and refuse any other field.
InferencePool: `inference.networking.k8s.io` v1 (bundle v1.4). HTTPRoute: `gateway.networking.k8s.io` v1. ScaledObject: `keda.sh`
v1alpha1. PodMonitor: `monitoring.coreos.com` v1.
"""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]


def _object(required: str, **fields: Schema) -> Schema:
    """An object with these fields and no others; `required` names some of them."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def _array(of: Schema, least: int = 1, most: int = 64) -> Schema:
    return {"type": "array", "items": of, "minItems": least, "maxItems": most}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


TEXT: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": 253}
NUMBER: Final[Schema] = {"type": "integer", "minimum": 0}
PORT: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 65535}
DURATION: Final[Schema] = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
LABELS: Final[Schema] = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": 64,
    "additionalProperties": {"type": "string", "pattern": r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"},
}

_POLICY: Final = _object(
    "stabilizationWindowSeconds",
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    policies=_array(
        _object(
            "type value periodSeconds",
            type=_one_of("Pods", "Percent"),
            value={"type": "integer", "minimum": 1},
            periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
        )
    ),
)

SPECS: Final[dict[tuple[str, str], Schema]] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): _object(
        "selector targetPorts endpointPickerRef",
        selector=_object("matchLabels", matchLabels=LABELS),
        targetPorts=_array(_object("number", number=PORT), most=8),
        endpointPickerRef=_object(
            "name port",
            name=TEXT,
            kind=TEXT,
            port=_object("number", number=PORT),
            failureMode=_one_of("FailOpen", "FailClose"),
        ),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(
        "parentRefs rules",
        parentRefs=_array(_object("name", name=TEXT, namespace=TEXT), most=32),
        rules=_array(
            _object(
                "backendRefs",
                matches=_array(
                    _object(
                        "path",
                        path=_object(
                            "type value",
                            type=_one_of("Exact", "PathPrefix", "RegularExpression"),
                            value={"type": "string", "pattern": "^/", "maxLength": 1024},
                        ),
                    )
                ),
                backendRefs=_array(
                    _object("name", group={"type": "string"}, kind=TEXT, name=TEXT, port=PORT), most=16
                ),
                timeouts=_object("", request=DURATION, backendRequest=DURATION),
            ),
            most=16,
        ),
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        "scaleTargetRef triggers",
        scaleTargetRef=_object("name", apiVersion=TEXT, kind=TEXT, name=TEXT),
        minReplicaCount=NUMBER,
        maxReplicaCount=NUMBER,
        pollingInterval=NUMBER,
        cooldownPeriod=NUMBER,
        fallback=_object(
            "failureThreshold replicas",
            failureThreshold=NUMBER,
            replicas=NUMBER,
            behavior=_one_of(
                "static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"
            ),
        ),
        advanced=_object(
            "",
            horizontalPodAutoscalerConfig=_object(
                "", name=TEXT, behavior=_object("", scaleUp=_POLICY, scaleDown=_POLICY)
            ),
        ),
        triggers=_array(
            _object(
                "type metadata",
                type=_one_of("prometheus"),
                metricType=_one_of("AverageValue", "Value"),
                metadata=_object(
                    "serverAddress query threshold",
                    serverAddress={"type": "string", "pattern": "^https?://"},
                    query=TEXT,
                    threshold={"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
                    activationThreshold={"type": "string"},
                    ignoreNullValues=_one_of("true", "false"),
                ),
            )
        ),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        "selector podMetricsEndpoints",
        selector=_object(
            "",
            matchLabels=LABELS,
            matchExpressions=_array(
                _object(
                    "key operator",
                    key=TEXT,
                    operator=_one_of("In", "NotIn", "Exists", "DoesNotExist"),
                    values=_array(TEXT),
                )
            ),
        ),
        podMetricsEndpoints=_array(
            _object("port", port=TEXT, path={"type": "string", "pattern": "^/"}, interval=DURATION)
        ),
    ),
}


def schema_of(api_version: str, kind: str) -> Schema | None:
    """The whole object's schema; None for kinds that are Kubernetes' own."""
    spec = SPECS.get((api_version, kind))
    if spec is None:
        return None
    metadata = _object("name", name=TEXT, namespace=TEXT, labels=LABELS)
    return _object("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)
