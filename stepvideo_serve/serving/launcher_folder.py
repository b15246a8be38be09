"""What the models of one server keep in their launcher's folder: kept results, and the signs that cancel requests."""

import os
import shutil
from pathlib import Path

from stepvideo_serve.config import IdempotencyConfig
from stepvideo_serve.launch.stopping import LINKS_VARIABLE
from stepvideo_serve.scheduling.idempotency import Results
from stepvideo_serve.scheduling.kept_results import KeptResults
from stepvideo_serve.scheduling.request_signs import RequestSigns


def signs_folder() -> Path | None:
    """Where the signs lie; None in a server that something else than the launcher started."""
    return _inside("requests")


def results_of(config: IdempotencyConfig, model: str) -> Results:
    """The results of a public model. What a process of this model has left behind is removed."""
    folder = _inside(f"results-{model}")
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    signs = RequestSigns(signs_folder(), model)
    signs.begin()
    return Results(KeptResults(config.ttl_s, config.max_mib << 20, folder, config.max_file_mib << 20), signs)


def _inside(name: str) -> Path | None:
    folder = os.environ.get(LINKS_VARIABLE)
    return Path(folder) / name if folder else None
