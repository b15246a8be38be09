"""The seed, and nothing else, decides the noise."""

import pytest
import torch

from stepvideo_serve.sampling.denoise import request_noise

SHAPE = (6, 4, 3, 5)


@pytest.mark.parametrize("seed", [0, 1234, 2**31, 2**63 - 1])
def test_a_seed_gives_the_same_noise_again(seed: int) -> None:
    first = request_noise(seed, SHAPE)
    torch.manual_seed(99)
    torch.randn(10)
    again = request_noise(seed, SHAPE)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_seeds_differ() -> None:
    starts = {float(request_noise(seed, SHAPE)[0][0, 0, 0, 0]) for seed in (*range(50), 2**16, 2**31, 2**32 - 1)}
    assert len(starts) == 53


def test_the_global_generator_is_not_touched() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    request_noise(1, SHAPE)
    assert torch.equal(torch.randn(3), expected)


def test_both_noises_are_standard_normal_and_independent() -> None:
    latents, posterior = request_noise(7, (18, 16, 20, 20))
    assert latents.shape == (18, 16, 20, 20)
    assert posterior.shape == (1, 16, 20, 20)
    assert latents.dtype == posterior.dtype == torch.float32
    for noise in (latents, posterior):
        assert abs(float(noise.mean())) < 0.05
        assert abs(float(noise.std()) - 1) < 0.05
    correlation = torch.corrcoef(torch.stack([latents[0].flatten(), posterior.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.05


def test_the_noise_of_a_seed_does_not_change_between_versions() -> None:
    """A seed that a user has noted down must go on giving the same video."""
    latents, posterior = request_noise(7, (3, 4, 2, 2))
    assert latents.flatten()[:3].tolist() == pytest.approx([-0.8201345, 0.3956312, 0.8989085], abs=1e-6)
    assert posterior.flatten()[:3].tolist() == pytest.approx([-0.1781926, -0.2594989, -0.0144879], abs=1e-6)
