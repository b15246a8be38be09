"""The doctor's table, its JSON and its exit codes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepvideo_serve.doctor import command
from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.command import CHECKS, CONFIGURATION, Row, counted, table
from stepvideo_serve.doctor.finding import Finding, Level
from stepvideo_serve.launch.options import ServerOptions
from tests.doctor.conftest import Doctor, Examined

LEVELS = ["ok", "warning", "fault", "not looked at"]


def test_a_machine_that_can_serve_has_no_fault(doctor: Doctor, config: Path) -> None:
    done = doctor("--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert list(said) == ["config", "checks", "levels"]
    assert said["config"] == str(config)
    assert [sorted(row) for row in said["checks"]] == [["check", "found", "level", "remedy"]] * len(said["checks"])
    assert {type(value) for row in said["checks"] for value in row.values()} == {str}
    assert list(dict.fromkeys(row["check"] for row in said["checks"])) == [CONFIGURATION, *CHECKS]
    assert list(said["levels"]) == LEVELS
    assert said["levels"]["fault"] == 0
    assert sum(said["levels"].values()) == len(said["checks"])
    seen = {row["check"]: row["level"] for row in said["checks"]}
    assert {seen[check] for check in ("driver", "gpus", "gpu memory")} == {"not looked at"}
    assert {seen[check] for check in ("configuration", "server", "ports", "checkpoint", "tokenizers")} == {"ok"}
    for row in said["checks"]:
        assert bool(row["remedy"]) is (row["level"] in ("warning", "fault")), row


def test_a_fault_is_in_the_table_and_in_the_exit_code(doctor: Doctor, model: Path) -> None:
    (model / "vae/vae_v2.safetensors").unlink()
    done = doctor()
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    [at] = [number for number, line in enumerate(lines) if line.startswith("fault")]
    assert lines[at].split(maxsplit=2)[1:] == ["checkpoint", f"{model}/vae/vae_v2.safetensors is missing."]
    fetch = f"hf download stepfun-ai/stepvideo-ti2v vae/vae_v2.safetensors --local-dir {model}"
    assert lines[at + 1].strip() == f"-> {fetch}"
    assert ", 1 fault" in lines[-1]


def test_warnings_alone_are_no_reason_to_fail(doctor: Doctor, config: Path) -> None:
    with config.open("a") as file:
        file.write("[idempotency]\nmax_file_mib = 1000000000\n")
    done = doctor()
    assert done.returncode == 0
    assert "lower [idempotency] max_file_mib" in done.stdout


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[mdoel]\n", "got 'mdoel'"),
        ("not toml", "must be TOML"),
        ('[denoiser]\nlayout = "cfg3"\n', 'layout must be "single" or parts'),
        ("[limits]\nmax_frames = 17\n", "[defaults] must be what [limits] allow"),
        ('[pricing]\nfiles = ["none.json"]\n', "none.json"),
    ],
)
def test_a_configuration_that_cannot_be_read_comes_first(
    examined: Examined, config: Path, text: str, sentence: str
) -> None:
    with config.open("a") as file:
        file.write(text)
    found = examined()
    [row] = found.pop(CONFIGURATION)
    assert row.level is Level.FAULT
    assert sentence in row.found
    assert {rows[0].level for rows in found.values()} == {Level.UNSEEN}
    assert list(found) == list(CHECKS)


def test_options_of_serve_are_looked_at_too(doctor: Doctor, tmp_path: Path) -> None:
    done = doctor("--grpc-certificate", str(tmp_path / "none.pem"))
    assert done.returncode == 1
    assert "A certificate and its private key go together" in done.stdout
    assert doctor("--no-such-option").returncode == 2


def test_a_check_that_fails_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, config: Path, options: ServerOptions
) -> None:
    def broken(_case: Case) -> Iterator[Finding]:
        yield Finding(Level.OK, "so far")
        raise ZeroDivisionError("by zero")

    def absent(_case: Case) -> Iterator[Finding]:
        raise ModuleNotFoundError("No module named 'spleen'", name="spleen")
        yield

    real = command._lazily
    others = {"server": broken, "cores": absent}
    monkeypatch.setattr(command, "_lazily", lambda module, name: others.get(name) or real(module, name))
    rows = command.examine(config, options, {})
    assert list(dict.fromkeys(row.check for row in rows)) == [CONFIGURATION, *CHECKS]
    said = [(row.check, row.found) for row in rows if row.level is Level.FAULT]
    assert said == [
        ("server", "The check failed: ZeroDivisionError: by zero."),
        ("cores", "The package spleen must be installed, it is not: No module named 'spleen'."),
    ]


def test_the_table_is_aligned() -> None:
    rows = [Row("a", Level.OK, "Well.", ""), Row("long name", Level.FAULT, "Ill.", "Rest.")]
    assert table(rows).splitlines() == [
        "ok             a          Well.",
        "fault          long name  Ill.",
        "                          -> Rest.",
        "",
        "1 ok, 1 fault",
    ]
    assert counted(rows) == {"ok": 1, "warning": 0, "fault": 1, "not looked at": 0}
