"""Runs the server, looks after it, and puts right what it cannot put right itself.

    python -m stepvideo_serve supervise --config serve.toml      # the options of `serve`, and those below

The ranks are started anew by `dit_denoiser`, and a request in flight goes on. What is left:

    a model's process has died, or stays stopped    its model is unloaded and loaded again (load alone revives nothing)
    a model gives no answer twice in a row, or      its process is killed, then the same
    says that one of its threads has died
    that fails, or is needed too often              the server is started anew, on the same ports
    the server has exited                           the same
    the server is needed anew too often             exit code 1, with the reason: whoever started this must decide

The pause before a new start doubles from RESTART_PAUSE_S. Every act is a line on standard error. SIGTERM, SIGHUP and
Ctrl-C let the requests end that were accepted, for the exit timeout at most, stop the server, and leave nothing behind.
"""

import argparse
import contextlib
import http.client
import os
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch import stop_signals
from stepvideo_serve.launch.health import SERVER, State, ask, check
from stepvideo_serve.launch.options import READY_TIMEOUT_S, add_server_arguments, server_options
from stepvideo_serve.launch.server import TritonServer, announce
from stepvideo_serve.launch.stub_processes import DEAD, STOPPED, Stub, state_of, stubs_of

LOOK_S = 1.0
RESTART_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
PROCESS_END_S = 5.0  # from SIGKILL of a model's process to its end


@dataclass(frozen=True)
class Rules:
    """check_s: between two checks of all models' answers; answer_s: how long an answer may take; stopped_s: how long a
    process may be stopped; load_s: how long a model may take to load; revivals of one model and restarts of the server
    that are allowed within window_s; ready_s: how long a start of the server may take."""

    check_s: float = 15.0
    answer_s: float = 10.0
    stopped_s: float = 10.0
    load_s: float = 1800.0
    ready_s: float = READY_TIMEOUT_S
    revivals: int = 3
    restarts: int = 5
    window_s: float = 3600.0


class Recent:
    """Times of something that must not happen too often."""

    def __init__(self, most: int, window_s: float) -> None:
        self._most, self._window_s = most, window_s
        self._times: deque[float] = deque()

    def __len__(self) -> int:
        return len(self._times)

    def allow(self) -> bool:
        """Whether it may happen once more; if so, it counts."""
        now_s = time.monotonic()
        while self._times and now_s - self._times[0] > self._window_s:
            self._times.popleft()
        if len(self._times) >= self._most:
            return False
        self._times.append(now_s)
        return True


class RestartNeeded(Exception):
    """Reviving a model did not help; the message is a clause that says why."""


class Supervisor:
    """Looks after one server; `say` gets a line about everything that is done.

    The server must have been started, with model_control, by the thread that calls `watch`.
    """

    def __init__(self, server: TritonServer, rules: Rules, say: Callable[[str], None]) -> None:
        self.server = server
        self._rules, self._say = rules, say
        self._revivals: dict[str, Recent] = defaultdict(lambda: Recent(rules.revivals, rules.window_s))
        self._models: dict[int, str] = {}  # of every process seen: a dead one has no command line
        self._buried: set[int] = set()
        self._stopped_since_s: dict[int, float] = {}
        self._doubted: set[str] = set()
        self._checked_s = time.monotonic()

    def watch(self) -> None:
        """Returns when the server has exited. Raises RestartNeeded when only a new start can help."""
        while self.server.running():
            self.look()
            time.sleep(LOOK_S)

    def look(self) -> None:
        """One look at the processes, and at the models' answers when it is time. Raises RestartNeeded."""
        for stub in self._broken():
            self._revive(stub.model, f"its process {stub.pid} {'has died' if stub.state == DEAD else 'stays stopped'}")
        if time.monotonic() - self._checked_s >= self._rules.check_s:
            self._check()
            self._checked_s = time.monotonic()

    def _broken(self) -> list[Stub]:
        """Dead processes, and those that have been stopped for too long; each model once."""
        now_s = time.monotonic()
        broken: dict[str, Stub] = {}
        stopped: dict[int, float] = {}
        for stub in stubs_of(self.server.pid, self._models):
            if stub.pid in self._buried:
                continue
            if stub.state == DEAD:
                broken[stub.model] = stub
            elif stub.state == STOPPED:
                stopped[stub.pid] = self._stopped_since_s.get(stub.pid, now_s)
                if now_s - stopped[stub.pid] > self._rules.stopped_s:
                    broken[stub.model] = stub
        self._stopped_since_s = stopped
        return list(broken.values())

    def _check(self) -> None:
        answers = check(self.server.http_url, "live", self._rules.answer_s).models
        if not answers and self.server.running():
            self._doubt(SERVER, self._give_up)
        else:
            self._doubted.discard(SERVER)
        for model, answer in answers.items():
            if answer.state in (State.DEAD, State.SILENT, State.BROKEN, State.ABSENT):
                self._doubt(model, partial(self._revive, model, f"it {answer.state.value}"))
            else:
                self._doubted.discard(model)

    def _doubt(self, who: str, act: Callable[[], None]) -> None:
        """Acts at the second doubt in a row."""
        if who in self._doubted:
            self._doubted.discard(who)
            act()
        else:
            self._doubted.add(who)

    def _give_up(self) -> None:
        raise RestartNeeded(f"{SERVER} does not answer")

    def _revive(self, model: str, why: str) -> None:
        """Unloads and loads the model. Raises RestartNeeded when it does not answer afterwards."""
        if not self._revivals[model].allow():
            raise RestartNeeded(f"{model} was revived {self._rules.revivals} times already, and {why}")
        self._say(f"{model} is loaded anew: {why}")
        began_s = time.monotonic()
        self._bury(model)
        for act in ("unload", "load"):
            if (failure := self._control(model, act)) is not None:
                raise RestartNeeded(f"the {act} of {model} failed: {failure}")
        self.server.close_regions()
        answer = ask(self.server.http_url, model, self._rules.answer_s)
        if answer.state is not State.WELL:
            raise RestartNeeded(f"{model}, loaded anew, {answer.state.value} {answer.said}".rstrip())
        self._say(f"{model} answers again after {time.monotonic() - began_s:.1f} s")

    def _bury(self, model: str) -> None:
        """Kills what is left of the model's processes; they are of no interest any more."""
        deadline_s = time.monotonic() + PROCESS_END_S
        mine = [stub for stub in stubs_of(self.server.pid, self._models) if stub.model == model]
        for stub in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)
            self._buried.add(stub.pid)
        while time.monotonic() < deadline_s and any(state_of(stub.pid)[0] not in ("", DEAD) for stub in mine):
            time.sleep(0.05)

    def _control(self, model: str, act: str) -> str | None:
        """Why the server did not do it; None if it did."""
        connection = http.client.HTTPConnection(self.server.http_url, timeout=self._rules.load_s)
        try:
            headers = {**self.server.options.security.operator_headers, "Content-Type": "application/json"}
            connection.request("POST", f"/v2/repository/models/{model}/{act}", "{}", headers)
            response = connection.getresponse()
            said = response.read().decode(errors="replace")
            return None if response.status == http.HTTPStatus.OK else said[:300]
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__
        finally:
            connection.close()


def supervise(server: TritonServer, rules: Rules, say: Callable[[str], None]) -> int:
    """Runs the server until this process is told to end. Returns 1 when it was needed anew too often.

    Raises SetupError when the server does not become ready the first time.
    """
    restarts = Recent(rules.restarts, rules.window_s)
    first = True
    while True:
        reason = ""
        with server:
            try:
                server.wait_ready(rules.ready_s)
                if first:
                    announce(server)
                else:
                    say(f"the server is ready again: gRPC {server.grpc_url}, HTTP {server.http_url}")
                first = False
                Supervisor(server, rules, say).watch()
                reason = f"it has exited with code {server.wait()}"
            except RestartNeeded as needed:
                reason = str(needed)
            except SetupError as error:
                if first:
                    raise
                reason = str(error)
        if not restarts.allow():
            say(
                f"the server was started anew {len(restarts)} times within {rules.window_s:g} s, and {reason}: given up"
            )
            return 1
        pause_s = min(RESTART_PAUSE_S * 2.0 ** (len(restarts) - 1), LONGEST_PAUSE_S)
        say(f"the server is started anew in {pause_s:g} s: {reason}")
        time.sleep(pause_s)
        server = server.same_again()


def main(argv: Sequence[str] | None = None) -> int:
    """0 after Ctrl-C, 128 + the number of another signal, 1 when the server could not be started or was needed anew too
    often."""
    parser = argparse.ArgumentParser(
        prog="python -m stepvideo_serve supervise", description=__doc__.splitlines()[0] if __doc__ else None
    )
    add_server_arguments(parser, (8001, 8000, 8002))
    parser.add_argument("--check-every", type=float, default=Rules.check_s, metavar="S", help="default: %(default)g s")
    parser.add_argument("--max-restarts", type=int, default=Rules.restarts, metavar="N", help="an hour; %(default)s")
    arguments = parser.parse_args(argv)
    stop_signals.heed_stop_signals()
    rules = Rules(check_s=arguments.check_every, restarts=arguments.max_restarts, ready_s=arguments.ready_timeout)
    try:
        options = replace(server_options(arguments), model_control=True)
        return supervise(TritonServer(options), rules, _say)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # how it is meant to end
        return 0


def _say(line: str) -> None:
    stop_signals.say(f"supervisor {time.strftime('%Y-%m-%dT%H:%M:%S%z')}: {line}.")
