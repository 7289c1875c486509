"""Owns the one result file of a GPU run and its short table: figures as multiples of the floor of the same run. Main thread.

`python -m loadtest.gpu.results FOLDER` takes the parts' JSON files into `results.json`, removes them, and prints the table:
what was measured beside its reach, and whether it was met. A run on a CPU has figures that mean nothing, and no verdicts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

PARTS = ("decode", "switches", "products", "vision", "prefill", "kernels", "quantised", "peer")
STEP_REACH = {
    ("moondream2", 1): 1.45,
    ("moondream2", 8): 1.4,
    ("moondream2", 32): 1.4,
    ("qwen3-0.6b", 1): 2.6,
}
"""Whole pipelined steps, greedy, as multiples of the time to read weights and KV at the run's own copy bandwidth."""
BUBBLE_REACH_MS = 0.02
CROP_REACH_MS = 1.5
SERVE_REACH = 55.0
"""Requests a second at 3 tokens, a picture of 9 crops each, 64 in flight."""
PEER_REACH = 2.0


def gather(folder: Path) -> dict[str, Any]:
    """The parts' files as one record, with what `results.json` already holds of parts that were not run again; the files
    are removed."""
    path = folder / "results.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found = [folder / f"{part}.json" for part in PARTS] + sorted(folder.glob("serve-*.json"))
    for file in found:
        if file.exists():
            record[file.stem] = json.loads(file.read_text())
    path.write_text(json.dumps(record, indent=1) + "\n")
    for file in found:
        file.unlink(missing_ok=True)
    return record


def short_table(record: dict[str, Any], *, smoke: bool = False) -> list[str]:
    """Lines of the table, none for parts that were not run."""
    lines: list[str] = []

    def say(
        what: str, value: float, unit: str, *, most: float | None = None, least: float | None = None
    ) -> None:
        told = f"{what:46} {value:9.3f} {unit:6}"
        if most is not None or least is not None:
            bound = f"≤ {most:g}" if most is not None else f"≥ {least:g}"
            met = value <= most if most is not None else value >= (least or 0.0)
            told += f" reach {bound:8} {'-' if smoke else 'met' if met else 'MISSED'}"
        lines.append(told.rstrip())

    decode = record.get("decode", {})
    if decode:
        say("copy bandwidth", decode["copy_bytes_per_s"] / 1e12, "TB/s")
    for one in decode.get("figures", []):
        reach = STEP_REACH.get((one["shape"], one["rows"]))
        if one["depth"] != 2 or one["sampled"] or one["path"] != "fused" or (reach is None and not smoke):
            continue
        name = f"{one['shape']}, {one['rows']} rows: whole step"
        say(name, one["step_ms"] / one["floor_ms"], "× floor", most=reach)
        say("  step", one["step_ms"], "ms")
        say("  bubble: step less a replay", one["bubble_ms"], "ms", most=BUBBLE_REACH_MS)
    for one in record.get("switches", {}).get("figures", []):
        if one["turned"] != "as served":
            continue
        name = f"{one['shape']}, {one['rows']} rows: one replay"
        say(name, one["greedy_ms"] / one["floor_ms"], "× floor")
        others = [
            x for x in record["switches"]["figures"] if (x["shape"], x["rows"]) == (one["shape"], one["rows"])
        ]
        gains = sorted(
            ((one["greedy_ms"] - x["greedy_ms"]) * 1e3, x["turned"]) for x in others if x is not one
        )
        for gain, turned in [g for g in reversed(gains) if g[0] > 0][:4]:
            lines.append(
                f"  quicker {'with' if turned[0] == '+' else 'without'} {turned.lstrip('+')}: {gain:.1f} µs"
            )
    plain = {(one["shape"], one["rows"]): one for one in decode.get("figures", []) if _is_whole_step(one)}
    for one in record.get("quantised", {}).get("figures", []):
        if _is_whole_step(one):
            name = f"{one['shape']}, {one['rows']} rows"
            say(f"{name}: whole step", one["step_ms"] / one["floor_ms"], "× floor")
            beside = plain.get((one["shape"].partition(":")[0], one["rows"]))
            if beside is not None:
                say("  bf16's step over it", beside["step_ms"] / one["step_ms"], "×")
    vision = record.get("vision", {})
    for one in vision.get("figures", []):
        if one["what"] in ("9 crops", "26 crops") or smoke:
            say(f"vision, {one['what']}: a crop", one["captured_ms"] / one["crops"], "ms", most=CROP_REACH_MS)
    for one in vision.get("attention", []):
        default = ", torch's choice" if one["is_default"] else ""
        say(
            f"  attention {one['name'].split('_')[0].lower()}, {one['crops']} crops{default}", one["ms"], "ms"
        )
    for name in sorted(n for n in record if n.startswith("serve-")):
        rate = float(record[name]["all"]["throughput_rps"])
        say(f"{name} tokens, requests a second", rate, "/s", least=SERVE_REACH if name == "serve-3" else None)
    peer = record.get("peer", {})
    for rows, ours in peer.get("degas_tokens_per_s", {}).items():
        theirs = peer.get("transformers_tokens_per_s", {}).get(rows)
        if theirs:
            say(f"beside transformers, {rows} rows", ours / theirs, "×", least=PEER_REACH)
    lines += [f"FAILED {failure}" for failure in record.get("kernels", {}).get("failures", [])]
    return lines


def _is_whole_step(one: dict[str, Any]) -> bool:
    """Greedy, pipelined, by the kernels."""
    return one["depth"] == 2 and not one["sampled"] and one["path"] == "fused"


def main(
    folder: Annotated[Path, typer.Argument(help="Where the parts left their files.")],
    smoke: Annotated[bool, typer.Option("--smoke", help="Of a run on a CPU: no verdicts.")] = False,
) -> None:
    """Write `results.json`, print the table."""
    print("\n".join(short_table(gather(folder), smoke=smoke)))


if __name__ == "__main__":
    typer.run(main)
