"""The report of perf_analyzer's exports: stream.export and unary.export are real ones of three requests each, with the
bytes of pictures and videos cut after the first ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from perf.analyzer.report import Row, Sample, main, picture, read_export, read_folder, summarize, table, write_report
from stepvideo_serve.errors import SetupError


@pytest.fixture
def exports(root: Path) -> Path:
    return root / "tests" / "perf"


@pytest.fixture
def folder(exports: Path, tmp_path: Path) -> Path:
    """As perf_analyzer leaves it."""
    for name, export in (("ti2v.concurrency.2", "stream"), ("ti2v_unary.rate.0.5", "unary")):
        (tmp_path / f"{name}.export.json").write_bytes((exports / f"{export}.export").read_bytes())
    return tmp_path


def test_the_result_is_the_end_and_not_the_empty_response_after_it(exports: Path) -> None:
    raw = json.loads((exports / "stream.export").read_bytes().decode("latin-1"), strict=False)
    requests = raw["experiments"][0]["requests"]
    samples = read_export(exports / "stream.export")
    assert len(samples) == len(requests) == 3
    for sample, request in zip(samples, requests, strict=True):
        times_ns = np.array(request["response_timestamps"]) - request["timestamp"]
        assert sample.first_s == pytest.approx(times_ns[0] * 1e-9)
        assert sample.end_to_end_s == pytest.approx(times_ns[-2] * 1e-9), "the last but one has the result"
        report = json.loads(request["response_outputs"][-2]["REPORT"])
        assert sample.first_s < sample.working_s < report["seconds"]["total"] < sample.end_to_end_s
        steps = report["seconds"]["total"] - report["seconds"]["denoise"] + sum(report["step_seconds"])
        assert sample.working_s == pytest.approx(steps, abs=0.1), "between stages there is next to nothing"


def test_a_unary_call_has_one_response(exports: Path) -> None:
    for sample in read_export(exports / "unary.export"):
        assert sample.first_s == sample.end_to_end_s > sample.working_s


def test_figures() -> None:
    samples = [Sample(sent_s=10.0 + i, first_s=0.5, end_to_end_s=2.0 + i, working_s=1.0) for i in range(3)]
    row = summarize("ti2v", "concurrency", 2.0, samples)
    assert (row.model, row.load, row.value, row.requests, row.first_p50_s) == ("ti2v", "concurrency", 2.0, 3, 0.5)
    assert (row.p50_s, row.p95_s, row.p99_s) == pytest.approx((3.0, 3.9, 3.98))
    assert row.per_s == pytest.approx(3 / 6.0), "from the first request at 10 s to the last result at 16 s"
    assert row.waiting == pytest.approx(1 - 3 / 9)


def test_a_folder_becomes_a_table_a_picture_and_json(folder: Path) -> None:
    text = write_report(folder)
    rows = read_folder(folder)
    assert [(row.model, row.load, row.value) for row in rows] == [
        ("ti2v", "concurrency", 2.0),
        ("ti2v_unary", "rate", 0.5),
    ]
    assert (folder / "report.md").read_text() == text == table(rows)
    assert [Row(**row) for row in json.loads((folder / "report.json").read_text())] == rows
    assert "| ti2v | 2 in flight | 3 | 0.54 s | 30.22 s | 42.65 s | 43.75 s | 3.0 | 1% |" in text.splitlines()
    assert (folder / "report.png").stat().st_size > 0


def test_the_picture_is_to_scale() -> None:
    samples = [[Sample(0.0, 0.0, end_s, 0.0) for end_s in (p50, p50, 4.0)] for p50 in (1.0, 2.0)]
    rows = [summarize("m", "rate", 1.0, of_row) for of_row in samples]
    pixels = np.asarray(picture(rows))
    dark = [(pixels == (50, 80, 225)).all(axis=-1).sum(axis=1)[60 + 34 * row] for row in range(2)]
    assert abs(dark[1] / dark[0] - 2) < 0.05


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be an export of perf_analyzer"),
        (b'{"experiments": [{}]}', "must be an export of perf_analyzer"),
        (b"[]", "must be an export of perf_analyzer"),
        (b'{"experiments": [{"requests": []}]}', "must have finished requests"),
        (
            b'{"experiments": [{"requests": [{"timestamp": 1, "response_timestamps": [2], "response_outputs":'
            b' [{"STEP": 1, "REPORT": ""}]}]}]}',
            "must have finished requests",
        ),
    ],
)
def test_what_is_no_export(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "ti2v.rate.1.export.json"
    path.write_bytes(content)
    with pytest.raises(SetupError, match=message):
        read_export(path)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == (folder / "report.md").read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 1
    assert "must have exports of perf_analyzer, found none" in capsys.readouterr().err
    (empty / "other.export.json").write_text("{}")
    assert main([str(empty)]) == 1
    assert "must be called MODEL.LOAD.VALUE.export.json" in capsys.readouterr().err
