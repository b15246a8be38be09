"""A test server that dies fails the test that met it, with its last log lines; the next test gets another server.

Who starts a server holds it in `watch`: with TritonServer(options) as server, watch(server): ...
When a watched server has ended by itself, the test that runs fails. The fixture that holds the server, and all that
depend on it, are ended after that test, so that the next test sets them up anew. The summary counts the deaths.
"""

import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from stepvideo_serve.launch.server import TritonServer

PLUGIN: Final = "server deaths"
GRACE_S: Final = 2.0  # a client sees the end of a connection before the parent sees the end of the process
POLL_S: Final = 0.05
LOG_TAIL_LINES: Final = 30

WatchServer = Callable[[TritonServer], AbstractContextManager[None]]
Setup = tuple[pytest.FixtureDef[Any], pytest.FixtureRequest]


@dataclass(eq=False)
class Held:
    """A server under watch, and the set-up of the fixture that holds it (None: a test does)."""

    server: TritonServer
    setup: Setup | None
    death: str = ""

    def has_died(self) -> bool:
        """Whether the process has ended by itself; says so in `death` the first time."""
        if self.death or self.server.running():
            return bool(self.death)
        code = self.server.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        owner = "a test" if self.setup is None else f"fixture {self.setup[0].argname}"
        self.death = f"The server of {owner} died ({how}): {log_tail(self.server.options.log)}"
        return True


def log_tail(log: Path | None) -> str:
    """The last lines of a server's log, and where they are."""
    if log is None:
        return "see its log above."
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line for line in lines if line and line[0] not in "+|"]  # without the server's wide tables
    return "\n".join([f"the end of {log} says", *told[-LOG_TAIL_LINES:]])


@dataclass(eq=False)
class ServerDeaths:
    """The plugin: what is watched, what has died and was not told yet, and one line for each death."""

    started: int = 0
    held: list[Held] = field(default_factory=list)
    untold: list[Held] = field(default_factory=list)
    to_end: list[Setup] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    setups: list[Setup] = field(default_factory=list)

    @contextmanager
    def watch(self, server: TritonServer) -> Iterator[None]:
        """Watches a server that has been started; leave the context before it is stopped."""
        held = Held(server, self.setups[-1] if self.setups else None)
        self.held.append(held)
        self.started += 1
        try:
            yield
        except BaseException:
            self._look(GRACE_S)
            raise
        else:
            self._look()
        finally:
            if held in self.held:
                self.held.remove(held)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Remembers whose set-up runs, and refuses a fixture that holds a server unwatched over several tests."""
        self.setups.append((fixturedef, request))
        try:
            result = yield
        finally:
            self.setups.pop()
        if fixturedef.scope != "function":
            self._refuse_unwatched(fixturedef.argname)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Makes the report of a test during which a server died that of a failure."""
        report = yield
        self._look(GRACE_S if report.failed else 0.0)
        told, self.untold = self.untold, []
        for held in told:
            self.deaths.append(f"{item.nodeid} ({report.when}): {held.death.splitlines()[0].partition(': ')[0]}.")
            if report.failed:
                report.sections.append(("test server", held.death))
            else:
                report.outcome, report.longrepr = "failed", held.death
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """After a test: ends the fixtures whose servers died."""
        ending, self.to_end = self.to_end, []
        for fixture, request in ending:
            try:
                fixture.finish(request)  # type: ignore[arg-type]  # what pytest calls a request is one of its subclass
            except (Exception, pytest.fail.Exception) as error:  # of what needed the server to the end
                self.deaths.append(f"  ending fixture {fixture.argname}: {type(error).__name__}: {error}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.started:
            died = sum(not line.startswith(" ") for line in self.deaths)
            terminalreporter.section(f"test servers: {self.started} started, {died} died")
            for line in self.deaths:
                terminalreporter.write_line(line)

    def _look(self, grace_s: float = 0.0) -> None:
        """Notes who has died; waits for the first death as long as `grace_s`."""
        deadline_s = time.monotonic() + grace_s
        while not (dead := [held for held in self.held if held.has_died()]):
            if not self.held or time.monotonic() >= deadline_s:
                return
            time.sleep(POLL_S)
        for held in dead:
            self.held.remove(held)
            self.untold.append(held)
            if held.setup is not None:
                self.to_end.append(held.setup)

    def _refuse_unwatched(self, fixture: str) -> None:
        watched = {held.server.pid for held in self.held}
        for child in psutil.Process().children():
            if child.pid not in watched and child.status() != psutil.STATUS_ZOMBIE and child.name() == "tritonserver":
                pytest.fail(f"Fixture {fixture} must hold its server in watch(server), but nobody watches {child.pid}.")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ServerDeaths(), PLUGIN)


@pytest.fixture(scope="session")
def watch(pytestconfig: pytest.Config) -> WatchServer:
    """Holds a server that was started: its death fails the test that runs."""
    plugin = pytestconfig.pluginmanager.get_plugin(PLUGIN)
    assert isinstance(plugin, ServerDeaths)
    return plugin.watch
