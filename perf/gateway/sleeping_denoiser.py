"""The model `dit_denoiser` of a benchmark's own repository, whose ranks sleep (sleeping_rank.py)."""

from stepvideo_serve.serving.denoiser import DenoiserModel


class SleepingDenoiser(DenoiserModel):
    """All as it is, but for the program of the ranks."""

    rank_factory = "perf.gateway.sleeping_rank:build_rank"
