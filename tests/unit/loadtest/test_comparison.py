"""Medians, ratios within a round, turns and tables of the comparison with other engines: pure."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from loadtest.comparison import median, median_ratio, quicker, same_share, times, turns
from loadtest.peers.engine_bench import Comparison, Workload, run_from
from loadtest.peers.process import PeerError
from loadtest.peers.side import Run


def run(seconds: float, tokens: list[list[int]] | None = None) -> Run:
    return Run(tokens or [[1, 2], [3, 4]], seconds, seconds / 2, seconds / 4, seconds / 8)


def test_a_ratio_is_taken_within_its_round_and_the_median_over_the_rounds() -> None:
    # The machine slows down threefold between rounds; the ratio of neighbours does not notice.
    rounds = [{"a": 20.0, "b": 10.0}, {"a": 60.0, "b": 30.0}, {"a": 90.0, "b": 30.0}, {"b": 1.0}, {"a": 1e9}]
    assert median_ratio(rounds, "a", "b", lambda value: value) == 2.0
    assert median_ratio(rounds, "b", "b", lambda value: value) == 1.0
    assert median_ratio(rounds, "a", "nobody", lambda value: value) is None
    assert median_ratio([{"a": 1.0, "b": 0.0}], "a", "b", lambda value: value) is None


def test_the_reference_is_the_quicker_form() -> None:
    rounds = [{"a": 1.0, "b": 3.0}, {"a": 5.0, "b": 3.0}, {"a": 1.0}]
    assert quicker(rounds, ("a", "b"), lambda value: value) == "b"
    assert quicker(rounds, ("b", "a"), lambda value: value) == "b"
    assert quicker([], ("a", "b"), lambda value: value) == "a"


def test_medians_skip_what_is_not_known() -> None:
    assert median([None, 3.0, 1.0, None, 2.0]) == 2.0
    assert median([None]) is None and median([]) is None
    assert times(None) == "–" and times(1.234) == "1.23×"


def test_same_tokens_count_position_by_position() -> None:
    assert same_share([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.75
    assert same_share([[1, 2], [3]], [[1, 2], [3]]) == 1.0
    assert same_share([[1, 2, 3, 4]], [[1, 2]]) == 0.5  # a missing token is not the same one
    assert same_share([], []) == 0.0


def test_every_engine_runs_once_a_round_and_behind_every_other() -> None:
    order = turns(["a", "b", "c"], 4)
    assert order == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert turns([], 2) == [[], []]


def test_rates_of_a_run() -> None:
    one = run(2.0)
    assert (one.tokens_per_s, one.tokens_per_cpu_s) == (2.0, 4.0)
    assert (one.decode_tokens_per_s, one.decode_tokens_per_cpu_s) == (4.0, 8.0)  # 2 of 4 came after the first
    assert Run([[1, 2]], 1.0, 1.0).decode_tokens_per_s is None


def comparison() -> Comparison:
    done = Comparison(Workload(rows=(2,), new_tokens=2, rounds=2), parameters=1_000_000)
    done.versions = {
        "degas": "degas",
        "transformers": "transformers 5",
        "transformers (cb)": "transformers 5",
    }
    done.rounds[2] = [
        {"degas": run(1.0), "transformers": run(3.0)},
        {
            "degas": run(2.0, [[1, 2], [3, 5]]),
            "transformers": run(8.0),
            "transformers (cb)": Run([[1, 2], [3, 4]], 20.0, 10.0),
        },
    ]
    done.notes[2] = {"transformers": "static cache"}
    return done


def test_figures_of_a_comparison() -> None:
    ours, theirs, other = comparison().figures()
    assert ours["engine"] == "degas" and ours["ratio"] == 3.5 and ours["cpu_ratio"] == 3.5
    assert ours["tokens_per_s"] == 3.0 and ours["same_tokens"] == 0.875 and ours["rounds"] == 2
    assert theirs["ratio"] == 1.0 and theirs["same_tokens"] == 1.0 and theirs["note"] == "static cache"
    assert (
        other["ratio"] == 0.4
        and other["reference"] == "transformers"
        and other["decode_ratio"] is None
        and other["rounds"] == 1
    )


def test_a_comparison_is_json_and_fits_eighty_columns() -> None:
    done = comparison()
    assert json.loads(json.dumps(done.to_json()))["figures"] == done.figures()
    assert len(done.to_json()["runs"]) == 5
    output = io.StringIO()
    Console(file=output, width=80).print(done.table())
    printed = " ".join(output.getvalue().split())
    assert "3.50×" in printed and "static cache" in printed and "…" not in printed


def test_without_transformers_there_are_figures_but_no_ratios() -> None:
    done = Comparison(Workload())
    done.versions = {"degas": "degas"}
    done.rounds[1] = [{"degas": run(1.0)}]
    (ours,) = done.figures()
    assert ours["tokens_per_s"] == 4.0 and ours["ratio"] is None and ours["same_tokens"] is None


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"shape": "7b"}, "--shape"),
        ({"rows": ()}, "--rows"),
        ({"rows": (1, 4096)}, "--rows"),
        ({"new_tokens": 1}, "--new-tokens"),
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"rounds": 0}, "--rounds"),
        ({"threads": 0}, "--threads"),
        ({"cores": (100_000,)}, "--cores"),
    ],
)
def test_a_workload_out_of_bounds_is_refused_by_name(changed: dict[str, object], option: str) -> None:
    with pytest.raises(ValueError, match=option):
        Workload(**changed).check()  # type: ignore[arg-type]


def test_an_answer_that_is_not_what_was_asked_for_is_refused() -> None:
    good = {"tokens": [[1, 2], [3, 4]], "seconds": 1.0, "cpu_s": 1.0}
    assert run_from(good, 2, 2).num_tokens == 4
    for bad in (good | {"tokens": [[1, 2], [3]]}, good | {"tokens": [[1, 2]]}, good | {"seconds": 0.0}, {}):
        with pytest.raises(PeerError):
            run_from(bad, 2, 2)
