"""The world is deterministic, its combinations are split as stated, and the metrics are perfect on true clips."""

import statistics
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from export.compare.graph_stages import read_requests
from stepvideo_serve.video.image import decode_image
from toyworld import calibration_pairs, metrics
from toyworld.evaluate import held_out_scene, measure
from toyworld.prompts import OPPOSITE, prompt, wordings
from toyworld.samples import bytes_to_pixels, pixels_to_bytes
from toyworld.training.latents import scene_number
from toyworld.world import FRAMES, MOTION_SCORES, SIZE_PX, Scene, draw_scene, render, subjects

SCENE = Scene("triangle", "blue", "up", False, 2, 10.0, 31.0, 35.5)


def test_a_scene_gives_the_same_clip_whole_and_in_parts() -> None:
    clip = render(SCENE)
    assert clip.shape == (FRAMES, 3, SIZE_PX, SIZE_PX)
    assert clip.abs().max() <= 1
    assert torch.equal(clip, render(SCENE))
    assert torch.equal(clip[17:], render(SCENE, 17, 17))


def test_a_seed_gives_the_same_scene() -> None:
    one, two = (draw_scene(torch.Generator().manual_seed(5)) for _ in range(2))
    assert one == two
    assert one != draw_scene(torch.Generator().manual_seed(6))


def test_held_out_combinations_are_new_and_their_pairs_are_not() -> None:
    seen, held_out = set(subjects(held_out=False)), set(subjects(held_out=True))
    assert not seen & held_out
    assert len(seen) == 72
    assert len(held_out) == 24
    for parts in combinations(((0,), (1,), (2, 3)), 2):
        places = [place for part in parts for place in part]
        assert {tuple(s[p] for p in places) for s in held_out} <= {tuple(s[p] for p in places) for s in seen}


def test_drawn_scenes_keep_to_their_side_of_the_split() -> None:
    for held_out in (False, True):
        assert {scene_number(i, held_out).subject for i in range(300)} <= set(subjects(held_out))
    assert held_out_scene(0).subject in subjects(held_out=True)


def test_the_direction_says_nothing_about_the_start() -> None:
    scenes = [scene_number(i, held_out=False) for i in range(2000)]
    for direction, axis in (("left", "x"), ("right", "x"), ("up", "y"), ("down", "y")):
        starts = [getattr(scene, axis) for scene in scenes if scene.direction == direction]
        error = statistics.stdev(starts) / len(starts) ** 0.5
        assert abs(statistics.mean(starts) - SIZE_PX / 2) < 4 * error


def test_every_wording_names_what_distinguishes_the_scene() -> None:
    for scene in (SCENE, replace(SCENE, camera=True)):
        texts = wordings(scene)
        assert len(set(texts)) == 4
        assert all("蓝色" in text and "三角形" in text and "上" in text for text in texts[:2])
        assert all("blue triangle" in text and "up" in text for text in texts[2:])
        assert not set(texts) & set(wordings(replace(scene, direction=OPPOSITE[scene.direction])))
    picked = Counter(prompt(SCENE, torch.Generator().manual_seed(i)) for i in range(40))
    assert set(picked) == set(wordings(SCENE))


@pytest.fixture(scope="module")
def true_clips() -> list[tuple[Scene, torch.Tensor]]:
    """Held-out scenes and their clips, rounded to bytes as a decoder's are."""
    scenes = [held_out_scene(i) for i in range(32)]
    return [(scene, bytes_to_pixels(pixels_to_bytes(render(scene)))) for scene in scenes]


def test_metrics_are_perfect_on_true_clips(true_clips: list[tuple[Scene, torch.Tensor]]) -> None:
    results = [measure(clip, scene) for scene, clip in true_clips]
    assert all(r.direction and r.colour and r.shape and r.camera for r in results)
    assert all(r.first_frame_db == float("inf") for r in results)
    rounded = [round(r.speed, 1) for r in results]  # equal scores, equal speeds
    assert metrics.spearman([r.motion_score for r in results], rounded) == pytest.approx(1)
    for (scene, _), result in zip(true_clips, results, strict=True):
        assert result.speed == pytest.approx(scene.motion_score / 30, abs=0.03)
        assert result.seam == pytest.approx(1, abs=0.25)


def test_metrics_see_what_is_wrong(true_clips: list[tuple[Scene, torch.Tensor]]) -> None:
    scene, clip = true_clips[0]
    result = measure(
        clip,
        replace(
            scene,
            colour="red" if scene.colour != "red" else "blue",
            shape="square" if scene.shape != "square" else "circle",
        ),
    )
    assert not result.colour
    assert not result.shape
    assert result.direction
    assert not measure(clip, replace(scene, direction=OPPOSITE[scene.direction])).direction
    assert not measure(clip, replace(scene, camera=not scene.camera, direction=OPPOSITE[scene.direction])).camera


def test_metrics_of_a_still_empty_picture() -> None:
    clip = render(SCENE, 0, 1)[:, :, :8, :8].mean(dim=(2, 3), keepdim=True).expand(FRAMES, 3, SIZE_PX, SIZE_PX)
    assert metrics.velocity(metrics.centres(clip, SCENE.background)) == (0.0, 0.0)
    assert metrics.colour(clip, SCENE.background) is None
    assert metrics.shape(clip, SCENE.background) is None
    assert not measure(clip, SCENE).direction


def test_rank_correlation_against_known_values() -> None:
    assert metrics.spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert metrics.spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert metrics.spearman([1, 1, 2, 2], [1, 1, 2, 2]) == pytest.approx(1)


def test_peak_signal_to_noise_ratio_of_a_known_error() -> None:
    frames = torch.zeros(2, 3, 4, 4)
    assert metrics.psnr(frames + 0.02, frames) == pytest.approx(40, abs=1e-3)


def test_a_jump_between_the_chunks_shows_in_the_seam() -> None:
    clip = render(replace(SCENE, motion_score=MOTION_SCORES[1]))
    jumped = torch.cat([clip[:17], clip[21:], clip[-4:]])
    assert metrics.seam(jumped) > 2 * metrics.seam(clip)


def test_calibration_pairs_are_pictures_with_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["calibration_pairs", "--out", str(tmp_path / "new"), "--count", "3"])
    assert calibration_pairs.main() == 0
    requests = read_requests(tmp_path / "new", None, 8, num_frames=34, height=SIZE_PX, width=SIZE_PX)
    assert list(requests) == ["toy_000", "toy_001", "toy_002"]
    trained = [Scene(*subject, 0, 2, 0.0, 0.0) for subject in subjects(held_out=False)]
    known = {text for scene in trained for text in wordings(scene)}
    for request in requests.values():
        assert request.prompt in known
        picture = decode_image(request.image)
        assert picture.size == (SIZE_PX, SIZE_PX)
        assert len(picture.getcolors(SIZE_PX**2) or []) > 2, "a shape on a background"
