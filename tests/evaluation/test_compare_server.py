"""`stepvideo compare --set` on running servers: the same requests made twice, and prices that servers take."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perf.prices.measure import Case, Measurement, PriceStages, Variant, encode_texts, prompts_of
from perf.prices.summary import measures
from stepvideo_client import Client, Result
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.planning.prices import Price, PriceFile
from stepvideo_serve.planning.pricing import Pricing
from stepvideo_serve.request import GenerationRequest, parse_request
from stepvideo_serve.request.presets import shipped_presets
from tests.evaluation.reading import run
from tests.server_deaths import WatchServer
from tests.serving.launch import EAGER, serving
from toyworld.evaluate import CHECKPOINT, held_out_scene, wording
from toyworld.samples import Sampling, make_request, serve_config
from toyworld.scene_set import write_scenes

STEPS = 12
SEED = 7
SCENES = 4
SAMPLING = Sampling(50, 7.0, 4.0)
# docs/quality.md, "Their prices on the toy world", CFG 4, shift 7, 16 scenes: least and most of single clips.
BALANCED_EVALUATIONS = (12, 21)
BALANCED_WORST_ERROR = 1.8e-3
EQUAL = ("--min-psnr", "99", "--min-ssim", "1", "--max-latent-error", "0", "--max-motion-change", "0", "--each")


def comparison(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    return values


def sides(url: str, a: str, b: str) -> list[str]:
    return ["--a", f"{url},quality={a}", "--b", f"{url},quality={b}"]


def test_exact_with_itself_is_equal_and_a_preset_gets_a_price(
    mini_server: TritonServer, pairs: Path, tmp_path: Path
) -> None:
    """A mask that evaluates every step is exact by another name, and is made anew."""
    url, both = mini_server.grpc_url, ["--with", f"infer-steps={STEPS}", f"seed={SEED}", "cfg-scale=4"]
    same = sides(url, "exact", f"mask:{'1' * STEPS}")
    assert run("compare", "--set", pairs, *same, *both, "--out", tmp_path / "same", "--latents", *EQUAL) == 0
    assert comparison(tmp_path / "same")["equal"] == 3
    assert mini_server.options.config is not None
    config, path = ServeConfig.load(mini_server.options.config), tmp_path / "prices.json"
    priced = [*sides(url, "exact", "rough"), *both, "--price-file", path]
    priced += ["--checkpoint", Checkpoint(config.model.dir).identity]
    assert run("compare", "--set", pairs, *priced, "--out", tmp_path / "rough") == 0
    assert comparison(tmp_path / "rough")["summary"]["evaluations_ratio"]["most"] < 1
    unpriced, known = Pricing.of(config), Pricing.of(replace(config, pricing=replace(config.pricing, files=(path,))))
    options: dict[str, Any] = {"seed": SEED, "steps": STEPS, "cfg_scale": 4.0, "quality": "rough"}
    with Client(url) as client:
        *_, result = client.generate(next(pairs.glob("a_wide.png")), "a cat", **options)
    assert isinstance(result, Result)
    assert [warning["gate"] for warning in result.report["warnings"]] == ["price"]
    request = make_priced_request(config, options)
    assert unpriced.warning(request, config.presets["rough"]) is not None
    assert known.warning(request, config.presets["rough"]) is None
    for price in PriceFile.load(path).prices:
        assert price.parameters == config.presets["rough"].parameters()


def make_priced_request(config: ServeConfig, options: dict[str, Any]) -> GenerationRequest:
    """The same request, as a server parses it."""
    inputs = {
        "PROMPT": np.array([b"a cat"], np.object_),
        "IMAGE": np.array([b"image"], np.object_),
        "STEPS": np.array([options["steps"]], np.int32),
        "CFG_SCALE": np.array([options["cfg_scale"]], np.float32),
        "QUALITY": np.array([options["quality"].encode()], np.object_),
    }
    return parse_request(inputs, config.limits, 8, config.defaults)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out scenes of the toy world as a set."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), SCENES)


TOY = """
[defaults]
num_frames = 34
height = 64
width = 64
[limits]
max_frames = 34
max_height = 64
max_width = 64
"""


@pytest.fixture
def toy_servers(
    root: Path, tmp_path: Path, watch: WatchServer
) -> Callable[[str], AbstractContextManager[TritonServer]]:
    """Starts the toy world's server with more lines in its configuration."""

    def start(more: str) -> AbstractContextManager[TritonServer]:
        folder = tmp_path / f"server-{abs(hash(more))}"
        folder.mkdir()
        return serving(root, folder, EAGER.format(model=CHECKPOINT, layout="single") + TOY + more, watch)

    return start


def local_prices(scenes_count: int) -> Any:
    """What `make prices` measures of the same requests, in this process."""
    config = serve_config(CHECKPOINT)
    cases = []
    for index in range(scenes_count):
        scene = held_out_scene(index)
        request = make_request(config, 8, scene, wording(scene, index), SEED, SAMPLING, "latents")
        cases.append(Case(f"scene{index}", request))
    stages = PriceStages(config, encode_texts(config, prompts_of(cases)))
    variants = [Variant("exact"), Variant("balanced", shipped_presets()["balanced"])]
    measurement = Measurement({None: stages}, variants, lambda frames, number: {})  # noqa: ARG005
    of_cases = [measurement.clips(case, number, lambda text: None) for number, case in enumerate(cases)]  # noqa: ARG005
    return measures([clips[1] for clips in of_cases], [clips[0] for clips in of_cases])


@pytest.mark.slow
@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"{CHECKPOINT} is not there: see toyworld.train")
def test_the_toy_worlds_prices_and_a_server_that_takes_them(toy_servers: Any, scenes: Path, tmp_path: Path) -> None:
    """As `make prices` measures the same requests; and with the file, REPORT no longer warns."""
    path, out = tmp_path / "prices.json", tmp_path / "out"
    options = ["--with", "infer-steps=50", "cfg-scale=4", "time-shift=7", f"seed={SEED}"]
    identity = Checkpoint(CHECKPOINT).identity
    with toy_servers("") as server:
        both = sides(server.grpc_url, "exact", "balanced")
        limits = ["--max-latent-error", str(BALANCED_WORST_ERROR), "--max-motion-change", "0.02"]
        prices = ["--price-file", path, "--checkpoint", identity]
        assert run("compare", "--set", scenes, *both, *options, "--out", out, *prices, *limits) == 0
        assert "price" in gates(server.grpc_url, scenes)
    [price] = PriceFile.load(path).prices
    check_price(price)
    with toy_servers(f'[pricing]\nfiles = ["{path}"]\nrequire = true\n') as server:
        assert "price" not in gates(server.grpc_url, scenes)


def check_price(price: Price) -> None:
    """Against the table in docs/quality.md, and against the same requests in this process."""
    expected, found = local_prices(SCENES), price.measures
    assert found.clips == SCENES
    assert BALANCED_EVALUATIONS[0] <= found.evaluations.least <= found.evaluations.most <= BALANCED_EVALUATIONS[1]
    assert found.evaluations == expected.evaluations
    assert found.guided_share == 1
    assert found.latent_error.mean == pytest.approx(expected.latent_error.mean, rel=0.02)
    assert found.latent_error.most <= 2 * BALANCED_WORST_ERROR
    assert found.motion is not None
    assert found.motion.mean == pytest.approx(1, abs=0.02)


def gates(url: str, scenes: Path) -> list[str]:
    """Of the warnings in REPORT of a request under the preset."""
    options: dict[str, Any] = {"steps": 50, "cfg_scale": 4.0, "time_shift": 7.0, "seed": SEED, "quality": "balanced"}
    with Client(url) as client:
        *_, result = client.generate(scenes.with_name("scene0.png"), "红色圆形向右移动。", **options)
    assert isinstance(result, Result)
    return [warning["gate"] for warning in result.report["warnings"]]
