"""The machine without its GPUs: server, ports, proxies, shared memory, limits of processes, cores, disks."""

import os
import resource
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.finding import Findings, fault, ok, warning
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.errors import SetupError
from stepvideo_serve.geometry import FRAMES_PER_CHUNK, LATENTS_PER_CHUNK, PIXELS_PER_LATENT
from stepvideo_serve.launch.address import choose_ports, from_here, joined
from stepvideo_serve.launch.health import check as ask_health
from stepvideo_serve.launch.install import check_ascii, check_exposure, outdated, server_home, stub_of
from stepvideo_serve.launch.leftovers import SHARED_MEMORY, Claim

MIB: Final = 2**20
LEAST_SHARED_BYTES: Final = 16 * MIB  # a region of 1 MiB or a little more for each model, before any tensor
PUBLIC_MODELS: Final = 2  # ti2v and ti2v_unary keep results each for itself
FEW_FILES, TOO_FEW_FILES = 1024, 256
ANSWER_S: Final = 2.0
PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
EXCEPTIONS: Final = ("no_proxy", "no_grpc_proxy")


def server(case: Case) -> Findings:
    """Triton itself, and whether it may listen where it is told to."""
    repository = case.options.model_repository
    if not repository.is_dir():
        yield fault(f"The model repository must exist, there is nothing at {repository}.", "correct --model-repository")
    try:
        check_ascii(repository)
        home = server_home()
        stub_of(home)
        check_exposure(home, case.options.address, case.options.allow_outdated)
    except SetupError as error:
        yield fault(str(error), "put right what the sentence names")
        return
    old = ", with known vulnerabilities: on loopback only" if outdated(home) is not None else ""
    yield ok(f"Triton in {home}{old}.")


def ports(case: Case) -> Findings:
    """gRPC, HTTP and metrics. A server of this kind that runs there already is a warning."""
    options = case.options
    http_address = options.security.http_address(options.address)
    places = {
        "gRPC": (options.address, options.grpc_port),
        "HTTP": (http_address, options.http_port),
        "metrics": (options.address, options.metrics_port),
    }
    taken = []
    for name, place in places.items():
        try:
            choose_ports({name: place})
        except SetupError as error:
            taken.append((name, str(error)))
    if not taken:
        named = ", ".join(f"{name} {port or 'any'}" for name, (_, port) in places.items())
        yield ok(f"The ports are free: {named}, on {options.address}.")
    elif ask_health(joined(from_here(http_address), options.http_port or 1), "live", ANSWER_S).models:
        which = ", ".join(name for name, _ in taken)
        yield warning(
            f"A stepvideo server has the ports of {which} already.", "give a second one other ports, or 0 for any"
        )
    else:
        for name, sentence in taken:
            yield fault(sentence, f"stop what has it (ss -ltnp), or choose another with --{name.lower()}-port")


def proxies(case: Case) -> Findings:
    """Whether calls to the server, and its own to a collector of traces, would leave through a proxy."""
    environ = {name.lower(): value for name, value in case.environ.items() if value}
    found = [f"{name}={environ[name]}" for name in PROXIES if name in environ]
    if not found:
        yield ok("No proxy is set.")
        return
    excepted = [entry.strip() for name in EXCEPTIONS for entry in environ.get(name, "").split(",") if entry.strip()]
    hosts = {"the server": from_here(case.options.address)}
    if (collector := urlsplit(case.config.telemetry.otlp_endpoint).hostname) is not None:
        hosts["the collector of traces"] = collector
    through = {what: host for what, host in hosts.items() if not _is_excepted(host, excepted)}
    if not through:
        yield ok(f"{', '.join(found)}, but not for {' and '.join(hosts.values())}.")
    for what, host in through.items():
        yield warning(
            f"{', '.join(found)}: programs other than our client call {what} at {host} through it.",
            f"add {host} to no_proxy (and localhost, 127.0.0.1)",
        )


def _is_excepted(host: str, entries: list[str]) -> bool:
    return any(entry == "*" or host == entry or host.endswith(f".{entry.lstrip('.')}") for entry in entries)


def shared_memory(case: Case) -> Findings:
    """/dev/shm, through which tensors pass between Triton and its models."""
    try:
        name = f"stepvideo_{os.getpid()}_{secrets.token_hex(4)}"
        Claim(name, Path(tempfile.gettempdir(), name)).release()
    except SetupError as error:
        yield fault(str(error), f"mount a tmpfs at {SHARED_MEMORY} that this user may write")
        return
    found = os.statvfs(SHARED_MEMORY)
    free = found.f_bavail * found.f_frsize
    yield from shared_room(free, largest_frames_bytes(case.config.limits.max_tokens))


def shared_room(free: int, largest: int) -> Findings:
    """`free` bytes of shared memory against those of the largest result that a request may ask for."""
    wanted, said = LEAST_SHARED_BYTES + 2 * largest, f"{SHARED_MEMORY} has {free // MIB:,} MiB free"
    remedy = f"enlarge it (--shm-size {wanted // MIB + 1}m; mount -o remount,size={wanted // MIB + 1}m {SHARED_MEMORY})"
    if free < LEAST_SHARED_BYTES:
        yield fault(f"{said}, the models alone need {LEAST_SHARED_BYTES // MIB}.", remedy)
    elif free < wanted:
        yield warning(
            f"{said}, raw frames of the largest video that [limits] allow take up to {wanted // MIB:,}.", remedy
        )
    else:
        yield ok(f"{said}.")


def largest_frames_bytes(tokens: int) -> int:
    """Of the raw frames of a video of so many tokens."""
    return tokens * FRAMES_PER_CHUNK // LATENTS_PER_CHUNK * PIXELS_PER_LATENT**2 * 3


def limits(case: Case) -> Findings:
    """Of processes (ulimit): open files, size of files (shared memory counts), address space."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = f"ulimit -n {FEW_FILES * 16} (LimitNOFILE=, docker run --ulimit nofile=)"
    infinite = resource.RLIM_INFINITY
    well = True
    if files != infinite and files < FEW_FILES:
        well = False
        found = f"A process may have {files} open files; connections of callers count."
        yield fault(found, remedy) if files < TOO_FEW_FILES else warning(found, remedy)
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    arena = case.config.denoiser.arena_mib * MIB
    if size != infinite and size < arena:
        well = False
        yield fault(
            f"A file may have {size:,} bytes, which counts for shared memory too: the ranks' arenas need {arena:,}.",
            "ulimit -f unlimited (LimitFSIZE=infinity), or lower [denoiser] arena_mib",
        )
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != infinite:
        well = False
        found = f"A process may map {space // MIB:,} MiB of addresses; weights are mapped, and so is all GPU memory."
        remedy = "ulimit -v unlimited (LimitAS=infinity)"
        yield fault(found, remedy) if case.wants_gpus else warning(found, remedy)
    if well:
        yield ok(f"Open files: {'any number' if files == infinite else files}; sizes and addresses are not limited.")


def cores(case: Case) -> Findings:
    """What the processes may use of the machine's processors, against the ranks and their threads."""
    usable, ranks = usable_cores(), case.layout.world_size
    said = f"{usable} cores may be used (affinity and quota of the container)"
    threads = case.config.denoiser.threads
    if usable < ranks:
        yield warning(
            f"{said} by {ranks} ranks: signs of life may come late.", "raise the quota (cpus:, resources.limits.cpu)"
        )
    elif threads * ranks > usable:
        yield warning(
            f"{said}, {ranks} ranks have {threads} threads each: above a quota, threads stop each other.",
            "lower [denoiser] threads, or set it to 0",
        )
    else:
        yield ok(f"{said}.")


def disk(case: Case) -> Findings:
    """Where the launcher's folder, and results that are kept in files, go."""
    folder = Path(tempfile.gettempdir())
    if not os.access(folder, os.W_OK | os.X_OK):
        yield fault(f"The folder for temporary files {folder} must be writable, it is not.", "set TMPDIR to another")
        return
    free = shutil.disk_usage(folder).free
    settings = case.config.idempotency
    kept = PUBLIC_MODELS * settings.max_file_mib * MIB if case.config.limits.max_keep_s > 0 else 0
    said = f"{folder} has {free // MIB:,} MiB free"
    if free < MIB:
        yield fault(f"{said}: the launcher cannot keep its own files there.", "free some, or set TMPDIR to another")
    elif free < kept:
        yield warning(
            f"{said}, results that KEEP_S asks for may take {kept // MIB:,}.",
            "free some, set TMPDIR to another disk, or lower [idempotency] max_file_mib",
        )
    else:
        yield ok(f"{said}.")


def log(case: Case) -> Findings:
    """The folder of --log."""
    path = case.options.log
    if path is None:
        yield ok("It goes to standard error.")
        return
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if os.access(folder, os.W_OK) and (folder == path.absolute()) is not folder.is_dir():
        yield ok(f"{path} can be written.")
    else:
        yield fault(f"The log {path} must be writable, {folder} is not.", "correct --log, or the rights of the folder")
