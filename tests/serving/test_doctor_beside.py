"""The doctor beside a server that runs: its ports are no riddle."""

from pathlib import Path

from stepvideo_serve.doctor.command import examine
from stepvideo_serve.doctor.finding import Level
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer


def test_ports_of_a_server_of_this_kind(triton: TritonServer, root: Path) -> None:
    grpc, http = (int(url.rpartition(":")[2]) for url in (triton.grpc_url, triton.http_url))
    options = ServerOptions(root / "model_repository", grpc_port=grpc, http_port=http)
    assert triton.options.config is not None
    [row] = [row for row in examine(triton.options.config, options, {}) if row.check == "ports"]
    assert (row.level, row.found) == (Level.WARNING, "A stepvideo server has the ports of gRPC, HTTP already.")
    assert "other ports" in row.remedy
