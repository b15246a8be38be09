"""The gates of the shipped presets on the toy world: `make test-prices`. Held-out scenes, bf16 measured beside.

At the toy world's guidance and at the model's own, `balanced` may cost a third of what bf16 costs, `fast` as much, and
neither may change the motion. Both settings run at the same time, on one thread each.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perf.prices.measure import PriceStages, Variant, encode_texts, run
from stepvideo_serve.planning.prices import Measures, PriceFile
from stepvideo_serve.request.presets import Preset, shipped_presets
from stepvideo_serve.sampling.evaluation import EvaluationPlan
from toyworld.evaluate import CHECKPOINT
from toyworld.priced_scenes import scene_request
from toyworld.samples import Sampling, serve_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"{CHECKPOINT} is not there: see toyworld.train"),
]

SETTINGS = ("4:7", "9:13")
SCENES = 16
STEPS = 50
EVALUATIONS = {"balanced": 22, "fast": 18}
OF_BF16 = {"balanced": 1 / 3, "fast": 1.0}
MOTION = (0.98, 1.02)
RANK = 0.98
LONGEST_S = 3600


@pytest.fixture(scope="module")
def priced(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PriceFile]:
    """By setting."""
    folder = tmp_path_factory.mktemp("prices")
    common = [sys.executable, "-m", "perf.prices", "--model-dir", str(CHECKPOINT), "--config", str(root / "serve.toml")]
    common += ["--presets", "balanced", "fast", "--fewer-steps", "--bf16", "--no-decode-bf16", "--threads", "1"]
    common += ["--clips", str(SCENES), "--steps", str(STEPS)]
    paths = {setting: folder / f"{setting.replace(':', '-')}.json" for setting in SETTINGS}
    runs = [
        subprocess.Popen([*common, "--settings", setting, "--out", str(path)], cwd=root)
        for setting, path in paths.items()
    ]
    try:
        assert [one.wait(LONGEST_S) for one in runs] == [0] * len(runs)
    finally:
        for one in runs:
            one.kill()
    return {setting: PriceFile.load(path) for setting, path in paths.items()}


def measures(file: PriceFile, name: str) -> Measures:
    by_name = {price.preset: price.measures for price in file.prices}
    return by_name[name] if name in by_name else {other.name: other.measures for other in file.comparisons}[name]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_evaluations_and_error(priced: dict[str, PriceFile], setting: str, name: str) -> None:
    row, bf16 = measures(priced[setting], name), measures(priced[setting], "bf16")
    assert row.clips == bf16.clips == SCENES
    assert bf16.evaluations.mean == STEPS
    assert bf16.latent_error.mean > 0
    assert row.evaluations.mean <= EVALUATIONS[name]
    assert row.latent_error.mean <= bf16.latent_error.mean * OF_BF16[name]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_motion(priced: dict[str, PriceFile], setting: str, name: str) -> None:
    """Which PSNR does not show."""
    row = measures(priced[setting], name)
    assert row.motion is not None
    assert row.motion_rank is not None
    assert MOTION[0] <= row.motion.mean <= MOTION[1]
    assert row.motion_rank >= RANK


class LookingAcross(EvaluationPlan):
    """What the plan would be if guidance made no difference to the history."""

    def begins_anew(self, step: int) -> bool:
        return step == 0


def test_forecasts_do_not_look_across_a_change_of_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """At CFG 9 and shift 13, where the field jumps by the factor of CFG when guidance sets in."""
    torch.set_num_threads(1)
    config = serve_config(CHECKPOINT)
    interval = replace(shipped_presets()["balanced"], guidance_from=0.1)
    scenes = range(2)
    requests = [scene_request(config, 8, i, Sampling(STEPS, 13.0, 9.0)) for i in scenes]
    texts = [text for request in requests for text in (request.positive_prompt, request.negative_prompt)]
    stages = PriceStages(config, encode_texts(config, texts))
    for request in requests:
        exact, _ = run(stages, request, Variant("exact", Preset("exact", guidance_from=0.1)))
        anew, _ = run(stages, request, Variant("anew", interval))
        with monkeypatch.context() as patch:
            patch.setattr("stepvideo_serve.sampling.job.EvaluationPlan", LookingAcross)
            across, _ = run(stages, request, Variant("across", interval))
        error, error_across = (float((x - exact).norm() / exact.norm()) for x in (anew, across))
        assert error < 2e-3
        assert error_across > 5 * error
