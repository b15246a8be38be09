"""Starts Triton Inference Server on this machine, waits until it is ready, and stops it without leaving anything.

    python -m stepvideo_serve serve --config serve.toml            # until Ctrl-C or SIGTERM
    python -m stepvideo_serve run --config serve.toml -- COMMAND   # exits with COMMAND's code

The server is the one of /opt/tritonserver (the production image) or of the nvidia-pytriton wheel. It runs the models
in Python stubs of the running environment; they find the configuration file in STEPVIDEO_CONFIG. COMMAND finds the
server in STEPVIDEO_GRPC_URL, STEPVIDEO_HTTP_URL and STEPVIDEO_METRICS_URL.

A signal lets the requests end that were accepted (stopping.py); a second one stops at once, a third kills the server
(stop_signals.py). What a launcher that was killed has left, the next one removes (leftovers.py).
"""

import argparse
import contextlib
import http.client
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.address import choose_ports, for_grpc, for_http, from_here, joined
from stepvideo_serve.launch.deliveries import QUIET_S, wait_until_delivered
from stepvideo_serve.launch.http_key import leave_http_key
from stepvideo_serve.launch.install import (
    check_ascii,
    check_exposure,
    link_stub,
    outdated,
    server_environment,
    server_home,
)
from stepvideo_serve.launch.leftovers import SHARED_MEMORY, Claim, remove_leftovers
from stepvideo_serve.launch.options import READY_TIMEOUT_S, ServerOptions, add_server_arguments, server_options
from stepvideo_serve.launch.server_log import ServerLog
from stepvideo_serve.launch.start_watch import StartWatch
from stepvideo_serve.launch.stop_signals import die_with_parent, heed_stop_signals, say
from stepvideo_serve.launch.stopping import LauncherFolder, unanswered, wait_until_answered

TRITON_EXIT_S = 10  # for its own end, once there is no request left
EXIT_MARGIN_S = 5.0
PACKAGE_ROOT = Path(__file__).absolute().parents[2]
POLL_S = 0.1
MODEL_CONTROL = ("--model-control-mode=explicit", "--load-model=*")
# A unary call says nothing for minutes: callers may ping every 5 s (the least that Go sends is 10 s) with or without a
# call, and the server pings every minute, which keeps NAT and load balancers from forgetting the connection.
LONG_CALLS = (
    "--grpc-http2-min-recv-ping-interval-without-data=5000",
    "--grpc-http2-max-pings-without-data=0",
    "--grpc-keepalive-permit-without-calls=1",
    "--grpc-keepalive-time=60000",
)
PRIVATE = 0o077  # umask of the server: what it writes holds prompts, pictures and videos
FORWARDED_HEADERS = "(?i)^traceparent$"  # of a call, to the models as parameters of its requests


class TritonServer:
    """One server process in a process group of its own, as a context manager; entering starts it.

    The server gets SIGTERM when the thread that started it ends, even by SIGKILL: start it from a thread that lives
    as long as the server should. Raises SetupError when it cannot be started or does not become ready.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        name = f"stepvideo_{os.getpid()}_{secrets.token_hex(4)}"
        self.shm_prefix = f"{name}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._grpc_port = self._http_port = self._metrics_port = 0
        self._folder = LauncherFolder(name)
        self._claim: Claim | None = None
        self._log: ServerLog | None = None
        self._may_have_requests = False

    @property
    def pid(self) -> int:
        return self._started().pid

    @property
    def grpc_url(self) -> str:
        """HOST:PORT, as tritonclient.grpc takes it."""
        return joined(from_here(self.options.address), self._grpc_port)

    @property
    def http_address(self) -> str:
        """Where HTTP listens."""
        return self.options.security.http_address(self.options.address)

    @property
    def http_url(self) -> str:
        """HOST:PORT, as tritonclient.http takes it."""
        return joined(from_here(self.http_address), self._http_port)

    @property
    def metrics_url(self) -> str:
        """The address to scrape, with scheme and path."""
        return f"http://{self._metrics_place}/metrics"

    @property
    def _metrics_place(self) -> str:
        return joined(from_here(self.options.address), self._metrics_port)

    @property
    def addresses(self) -> dict[str, str]:
        """The environment variables that tell a client where the server is."""
        return {
            "STEPVIDEO_GRPC_URL": self.grpc_url,
            "STEPVIDEO_HTTP_URL": self.http_url,
            "STEPVIDEO_METRICS_URL": self.metrics_url,
        }

    def start(self) -> None:
        """Starts the process and returns at once; see wait_ready. Ports in use are found before anything starts."""
        options = self.options
        for what, path in (("model repository", options.model_repository), ("configuration", options.config)):
            if path is not None and not path.exists():
                raise SetupError(f"The {what} must exist, but there is nothing at {path}: correct the path.")
        check_ascii(options.model_repository)
        home = server_home()
        check_exposure(home, options.address, options.allow_outdated)
        link_stub(home)
        self._grpc_port, self._http_port, self._metrics_port = choose_ports(
            {
                "gRPC": (options.address, options.grpc_port),
                "HTTP": (self.http_address, options.http_port),
                "metrics": (options.address, options.metrics_port),
            }
        )
        remove_leftovers()
        self._claim = Claim(self._folder.path.name, self._folder.path)
        self._folder.make()
        if options.security.http_needs_key:
            leave_http_key(self._folder.path, self._http_port, options.security.operator_headers)
        self._log = ServerLog(options.log)
        self._process = subprocess.Popen(
            self._command(home),
            env={**server_environment(options.config), **self._folder.environment, **options.environment},
            cwd=PACKAGE_ROOT,  # where the stubs of the wheel look for modules first: they ignore PYTHONPATH
            stdin=subprocess.DEVNULL,
            stdout=self._log.write_end,
            stderr=self._log.write_end,
            process_group=0,
            umask=PRIVATE,
            restore_signals=False,  # a log that is not read any more must not end the server: SIGPIPE stays ignored
            preexec_fn=die_with_parent(),
            pass_fds=(self._claim.fd,),
        )
        self._log.started()

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when every model is loaded and every port answers.

        Raises SetupError with the reason as soon as the process exits or cannot become ready any more, or when the time
        is over.
        """
        process, watch = self._started(), StartWatch(self.pid)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answers = self._answers()
            self.close_regions()  # also of models that are still being loaded
            if answers:
                self._may_have_requests = True
                return
            try:
                code = process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                if not (self._log and self._log.model_refused) and (trouble := watch.trouble()) is not None:
                    raise SetupError(trouble) from None
                continue
            raise SetupError(self._log.reason() if self._log else f"The server must start, its code is {code}.")
        pending = self._log.still_loading() if self._log else ""
        raise SetupError(
            f"The server must become ready in {timeout_s:g} s, but it did not, {pending}: raise --ready-timeout."
        )

    def close_regions(self) -> None:
        """Takes the shared memory of the models away from other users of this machine: Triton makes a file at each
        load of a model, for all to read whatever the umask, and every tensor of the model passes through the file."""
        for region in SHARED_MEMORY.glob(f"{self.shm_prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                region.chmod(0o600)

    def wait(self) -> int:
        """Blocks until the server exits by itself; the exit code."""
        return self._started().wait()

    def running(self) -> bool:
        """Whether it was started and has not exited."""
        return self._process is not None and self._process.poll() is None

    def same_again(self) -> "TritonServer":
        """Another server with the options of this one and on its ports, for when this one is stopped."""
        grpc, http, metrics = self._grpc_port, self._http_port, self._metrics_port
        return TritonServer(replace(self.options, grpc_port=grpc, http_port=http, metrics_port=metrics))

    def drain(self) -> None:
        """Has new requests refused, and waits until those under way and waiting are answered and their callers have the
        answers, `exit_timeout_s` at most.

        Does nothing the second time, and where the server has exited or never was ready.
        """
        if not self._may_have_requests or not self.running():
            return
        self._may_have_requests = False  # also when a second signal cuts the waiting short
        self._folder.raise_sign()
        limit_s = self.options.exit_timeout_s
        deadline_s = time.monotonic() + limit_s
        if count := unanswered(self.http_url):
            say(f"stopping: {count} requests have up to {limit_s} s to end; a second signal stops at once.")
            wait_until_answered(self.http_url, deadline_s, self.running)
        wait_until_delivered((self._grpc_port, self._http_port), deadline_s, self.running, QUIET_S if count else 0.0)

    def stop(self) -> None:
        """Asks the server to finish, kills its process group when it does not, and removes what it leaves.

        Requests in flight fail: see `drain`. Safe to call twice, and after a crash of the server.
        """
        process, self._process = self._process, None
        if process is None:
            self._let_go()
            return
        try:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._triton_exit_s() + EXIT_MARGIN_S)
        finally:  # also when a second Ctrl-C cuts the waiting short
            # Stubs outlive a server that crashed; the group is gone when there are none.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for leftover in SHARED_MEMORY.glob(f"{self.shm_prefix}*"):
                leftover.unlink(missing_ok=True)
            self._let_go()

    def _let_go(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            self._folder.remove()
            claim.release()
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the server; where the block was left because this process is to end, after `drain`."""
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
                self.drain()
        finally:
            self.stop()

    def _triton_exit_s(self) -> int:
        return min(self.options.exit_timeout_s, TRITON_EXIT_S)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise SetupError("The server must be running, but it was not started or has been stopped: call start().")
        return self._process

    def _command(self, home: Path) -> list[str]:
        options = self.options
        return [
            str(home / "bin/tritonserver"),
            f"--model-repository={options.model_repository.absolute()}",
            f"--backend-directory={home / 'backends'}",
            f"--cache-directory={home / 'caches'}",
            f"--grpc-address={for_grpc(options.address)}",
            f"--grpc-port={self._grpc_port}",
            f"--http-address={for_http(self.http_address)}",
            f"--http-port={self._http_port}",
            f"--metrics-address={for_http(options.address)}",
            f"--metrics-port={self._metrics_port}",
            "--disable-auto-complete-config",
            *(MODEL_CONTROL if options.model_control else ("--model-control-mode=none",)),
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            f"--exit-timeout-secs={self._triton_exit_s()}",
            "--model-load-thread-count=2",  # more at once starve each other where cores are few
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--grpc-header-forward-pattern={FORWARDED_HEADERS}",
            f"--http-header-forward-pattern={FORWARDED_HEADERS}",
            *LONG_CALLS,
            *options.security.server_arguments(),
            *options.server_arguments,
        ]

    def _answers(self) -> bool:
        """Whether all models are ready. The metrics port is the last that the server opens."""
        for url, path in ((self.http_url, "/v2/health/ready"), (self._metrics_place, "/metrics")):
            connection = http.client.HTTPConnection(url, timeout=5.0)
            try:
                connection.request("GET", path)
                if connection.getresponse().status != http.HTTPStatus.OK:
                    return False
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()
        return True


def announce(server: TritonServer) -> None:
    """Says where a server that is ready is, and what is open that should not be."""
    if (sentence := outdated(server_home())) is not None:
        print(f"warning: {sentence}: keep it on loopback.", file=sys.stderr)
    if (sentence := server.options.security.warning(server.options.address)) is not None:
        print(f"warning: {sentence}.", file=sys.stderr)
    print(f"ready: gRPC {server.grpc_url}, HTTP {server.http_url}, {server.metrics_url}; Ctrl-C stops it", flush=True)


def _serve(server: TritonServer, ready_timeout_s: float) -> int:
    with server:
        server.wait_ready(ready_timeout_s)
        try:
            announce(server)  # a Ctrl-C may follow the line at once
            return server.wait()
        except KeyboardInterrupt:  # how it is meant to end
            server.drain()
            return 0


def _run(server: TritonServer, ready_timeout_s: float, command: Sequence[str]) -> int:
    with server:
        server.wait_ready(ready_timeout_s)
        try:
            code = subprocess.run(command, env=_environment_of_command(server), check=False).returncode
        except OSError as error:
            raise SetupError(f"COMMAND must be a program, but {command[0]} is not one: {error.strerror}.") from None
        return code if code >= 0 else 128 - code


def _environment_of_command(server: TritonServer) -> dict[str, str]:
    """This process's, the server's addresses, and no proxy on the way there."""
    environment = {**os.environ, **server.addresses}
    for name in ("no_proxy", "NO_PROXY"):  # programs look at one or the other
        environment[name] = ",".join(filter(None, (os.environ.get(name), from_here(server.options.address))))
    return environment


def serve_main(argv: Sequence[str] | None = None) -> int:
    """`serve`: 0 when Ctrl-C ended the server, else the server's own code; 1 when it could not start, 128 + the number
    of another signal."""
    parser = argparse.ArgumentParser(
        prog="python -m stepvideo_serve serve", description="Runs the server until it is told to stop."
    )
    add_server_arguments(parser, (8001, 8000, 8002))
    arguments = parser.parse_args(argv)
    return _main(arguments, _serve)


def run_main(argv: Sequence[str] | None = None) -> int:
    """`run`: COMMAND's exit code; 1 when the server could not start, 130 after Ctrl-C, 128 + the number of another
    signal."""
    parser = argparse.ArgumentParser(
        prog="python -m stepvideo_serve run", description="Runs the server as long as COMMAND runs."
    )
    add_server_arguments(parser, (0, 0, 0))
    parser.add_argument("argv", nargs="+", metavar="COMMAND", help="after --: the command and its arguments")
    arguments = parser.parse_args(argv)
    return _main(arguments, partial(_run, command=arguments.argv))


def _main(arguments: argparse.Namespace, act: Callable[[TritonServer, float], int]) -> int:
    heed_stop_signals()
    try:
        return act(TritonServer(server_options(arguments)), arguments.ready_timeout)
    except SetupError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
