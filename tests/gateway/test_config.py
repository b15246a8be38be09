"""What secrets can fill from the environment: the database's URL, the key of webhooks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepvideo_gateway.config import DATABASE_VARIABLE, SECRET_VARIABLE, GatewayConfig
from stepvideo_gateway.errors import ConfigError
from tests.gateway.conftest import environment


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text('[jobs]\ndatabase = "sqlite+aiosqlite:///jobs.sqlite"\nlease_s = 7.0\n', encoding="utf-8")
    config = GatewayConfig.load(path)
    url = "postgresql+psycopg://gateway:secret@db/videos"
    changed = config.in_environment({DATABASE_VARIABLE: url, "OTHER": "1"})
    assert (changed.jobs.database, changed.jobs.lease_s) == (url, 7.0)
    assert config.in_environment({"OTHER": "1"}) == config
    assert config.jobs.database == f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"


@pytest.mark.parametrize(("value", "found"), [("", "nothing"), ("postgres://gateway:hidden@db", "another text")])
def test_what_is_no_database_is_refused_without_its_password(value: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"{DATABASE_VARIABLE} must begin with .*, found {found}: ") as refusal:
        GatewayConfig().in_environment({DATABASE_VARIABLE: value})
    assert "hidden" not in str(refusal.value)


def test_the_command_uses_it_and_keeps_the_password_to_itself(root: Path, tmp_path: Path) -> None:
    def migrate(url: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "stepvideo_gateway", "migrate"],
            cwd=tmp_path,
            env={**environment(root), DATABASE_VARIABLE: url},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    done = migrate(f"sqlite+aiosqlite:///{tmp_path / 'mine' / 'jobs.sqlite'}")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "mine") == ["jobs.sqlite"]
    assert not (tmp_path / "gateway").exists(), "the default was not touched"
    away = migrate("postgresql+psycopg://gateway:hidden@127.0.0.1:9/videos")
    assert away.returncode == 2
    assert "The database must be usable, postgresql+psycopg://gateway:***@127.0.0.1:9/videos is not" in away.stderr
    assert "hidden" not in away.stderr


def test_the_key_of_webhooks_may_be_in_the_environment_alone(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text('[webhooks]\nurls = ["https://a.example/hook"]\n', encoding="utf-8")
    config = GatewayConfig.load(path)
    with pytest.raises(ConfigError, match=rf"secret or {SECRET_VARIABLE} must be whsec_ .*, found nothing: "):
        config.in_environment({})
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    assert config.in_environment({SECRET_VARIABLE: secret}).webhooks.secret == secret
    path.write_text(f'[webhooks]\nsecret = "{secret}"\n', encoding="utf-8")
    other = f"whsec_{'A' * 32}"
    assert GatewayConfig.load(path).in_environment({SECRET_VARIABLE: other}).webhooks.secret == other


@pytest.mark.parametrize(("value", "found"), [("", "nothing"), ("whsec_hidden", "another"), ("whsec_ü", "another")])
def test_what_is_no_key_is_refused_without_it(value: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"{SECRET_VARIABLE} must be whsec_ .*, found {found}") as refusal:
        GatewayConfig().in_environment({SECRET_VARIABLE: value})
    assert "hidden" not in str(refusal.value)
