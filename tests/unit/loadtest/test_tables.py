"""Every bench's table on a terminal of 80 columns: no cell is cut, whether it stands, is turned or is taken apart."""

from __future__ import annotations

import inspect
import io
import json
from dataclasses import asdict

import pytest
from rich.console import Console

from loadtest.bench import cli, shown
from loadtest.bench.cancels import Baseline, CancelReport
from loadtest.bench.first_token import FirstToken
from loadtest.bench.flood import FloodRow, flood_table
from loadtest.bench.loop import LoopRow
from loadtest.bench.pictures import PictureRow, measure, pictures_table
from loadtest.bench.simulate import command as simulate
from loadtest.bench.structured import Share
from loadtest.tables import Figures, of_objects, show

LOOP = [LoopRow(rows, 2.45, 0.141, 3.123, 2.6789, 41.0, 0.001, 38.22, 99.91, 12345.6) for rows in (1, 8, 32)]
FLOOD = [
    FloodRow(
        factor, 12345.6, 1234.5, 0.991, 123.4, 1234.5, 1.23, 123456, 12, 12.3, 1234.5, False, (100.0, 29999.0), 99.0, 4.56,
        100.0, 100.0, 123.0, None if factor < 2 else factor < 10,
    )
    for factor in (0.0, 1.0, 2.0, 5.0, 10.0)
]  # fmt: skip
BASELINE = Baseline(*range(1000, 1000 + len(inspect.signature(Baseline).parameters)))
CANCELS = CancelReport(100_000, 50_123, 49_000, 0, 1000, 123.456, BASELINE, BASELINE).to_json()
SIMULATED = {
    "gpu": "rtx3090",
    "rows": 32,
    "predicted_gain_pct": 10.047,
    "simulated_gain_pct": 9.176,
    "published_gain_pct": 11.6,
    "simulated_blocking_ms": 11.84,
    "simulated_pipelined_ms": 10.79,
}
DECODED = {
    "rows": 32,
    "degas_tokens_per_s": 1234.0,
    "transformers_tokens_per_s": 567.0,
    "ratio": 2.2,
    "cpu_ratio": 2.1,
}
TABLES = {
    "loop": shown.loop_table(LOOP, "b200"),
    "flood": flood_table(FLOOD, "8 rows, queue of 8, 16 tokens, b200"),
    "ttft": shown.first_token_table(
        [FirstToken("pipelined, late launch", 12.34, 56.78, 3.456)] * 3, 16, "b200"
    ),
    "structured": shown.structured_table([Share(20, "device", 12345.0, 0.987, 12.3)] * 8, 32, "b200"),
    "cancels": of_objects("cancels", [CANCELS]),
    "decode": shown.decode_table([DECODED] * 3, "bfloat16"),
    "pictures": pictures_table([PictureRow(12.0, "moondream", 1_326_000, 123.4, 31.2, 2.95, 0.28, 1.0)] * 6),
    "pocket": shown.accuracy_table({"query": 0.98765, "small_many_crops": {"query": 0.5, "scenes": 150}}),
    "simulate": of_objects("gain", [SIMULATED] * 16),
}


def printed(figures: Figures, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(figures)
    return output.getvalue()


def cells(figures: Figures) -> list[str]:
    return [cell for row in figures._rows for cell in row]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", TABLES)
def test_no_cell_is_cut(name: str, width: int) -> None:
    text = printed(TABLES[name], width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for cell in cells(TABLES[name]):
        assert cell in text, "a cell is whole, on one line"
    for word in " ".join(TABLES[name]._columns).split():
        assert word in text


def test_a_wide_terminal_gets_a_line_for_each_record() -> None:
    lines = printed(TABLES["loop"], 200).splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["1", "8", "32"]


def test_a_narrow_one_gets_a_line_for_each_figure() -> None:
    lines = [line.split() for line in printed(TABLES["loop"], 60).splitlines()]
    assert ["rows", "1", "8", "32"] in lines and ["blocking", "3.123", "3.123", "3.123"] in lines


def test_what_fits_nowhere_goes_on_in_the_next_line() -> None:
    figures = Figures("one", ("name", "a word"))
    figures.add("it", "x" * 200)
    text = printed(figures, 40)
    assert "…" not in text and text.count("x") == 200 and max(map(len, text.splitlines())) <= 40


def test_markup_is_text() -> None:
    figures = Figures("[b]", ("name",))
    figures.add("[red]x[/red]")
    assert "[red]x[/red]" in printed(figures, 80) and "[b]" in printed(figures, 80)


def test_a_line_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Figures("t", ("a", "b")).add("1")


def test_json_is_a_list_of_objects(capsys: pytest.CaptureFixture[str]) -> None:
    show(TABLES["loop"], [row.to_json() for row in LOOP], as_json=True)
    assert json.loads(capsys.readouterr().out) == [asdict(row) for row in LOOP]


def test_pictures_are_measured_both_ways() -> None:
    (row,) = measure([0.5], ["pocket"], 1)
    assert row.mean_difference == 0 and row.pictures_per_s > 0 and row.file_bytes > 10_000
    with pytest.raises(ValueError, match="none of moondream, pocket"):
        measure([0.5], ["other"], 1)


def test_every_bench_can_say_it_in_json() -> None:
    commands = [one.callback for one in cli.app.registered_commands]
    assert len(commands) >= 8
    for command in (*commands, simulate):
        assert command is not None and "as_json" in inspect.signature(command).parameters
