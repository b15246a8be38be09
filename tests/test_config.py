import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from stepvideo_serve.config import ENVIRONMENT_VARIABLE, ServeConfig, VideoConfig
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.request import CheckpointCard, RequestDefaults, RequestLimits
from toyworld.samples import CFG_SCALE, STEPS, TIME_SHIFT
from toyworld.world import FRAMES, SIZE_PX

MODEL = '[model]\ndir = "weights"\nengines_dir = "/engines"\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, MODEL)
    monkeypatch.chdir(tmp_path.parent)
    config = ServeConfig.load(Path(tmp_path.name, "serve.toml"))
    assert config.model.dir == tmp_path / "weights"
    assert config.model.engines_dir == Path("/engines")
    assert (config.model.backend, config.model.precision, config.model.device) == ("ort", "fp32", "cpu")
    assert config.limits == RequestLimits()
    assert config.denoiser.layout == "single"


def test_values(tmp_path: Path) -> None:
    text = MODEL + (
        'backend = "tensorrt"\nprecision = "fp8"\ndevice = "cuda"\n'
        "[limits]\nmax_steps = 9\ncfg_scale = [2, 3.5]\nmax_timeout_s = 60\n"
        "[defaults]\nnum_frames = 17\nsteps = 9\ncfg_scale = 2\n"
        "[card]\nsizes = [[34, 64, 64], [17, 64, 96]]\ncfg_scale = [2, 3]\n"
        "[text]\ncache_entries = 0\n"
        '[denoiser]\nthreads = 3\nmax_queued = 0\nstart_timeout_s = 5\narena_mib = 32\nlayout = "cfg2.tp4"\n'
        "[decoder]\nthreads = 2\n"
        "[video]\nfps = 24\ncrop = false\nffmpeg_threads = 1\n"
    )
    config = ServeConfig.load(written(tmp_path, text))
    assert (config.model.backend, config.model.precision, config.model.device) == ("tensorrt", "fp8", "cuda")
    assert config.limits == replace(RequestLimits(), max_steps=9, cfg_scale=(2.0, 3.5), max_timeout_s=60.0)
    assert isinstance(config.limits.cfg_scale[0], float)
    assert config.defaults == RequestDefaults(num_frames=17, steps=9, cfg_scale=2.0)
    assert config.card == CheckpointCard(((34, 64, 64), (17, 64, 96)), (2.0, 3.0))
    assert config.text.cache_entries == 0
    denoiser = config.denoiser
    assert (denoiser.threads, denoiser.max_queued, denoiser.arena_mib) == (3, 0, 32)
    assert (denoiser.start_timeout_s, denoiser.layout) == (5.0, "cfg2.tp4")
    assert config.decoder.threads == 2
    assert config.video == VideoConfig(fps=24, crop=False, ffmpeg_threads=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", r"\[model\] .* needs dir, engines_dir, got \[\]", id="no required section"),
        pytest.param('[model]\ndir = "x"', r"\[model\] .* needs engines_dir, got \['dir'\]", id="no required key"),
        pytest.param(MODEL + "[modle]", "the file .* may have card, decoder, .*, got 'modle'", id="unknown section"),
        pytest.param(
            MODEL + "[text]\ncache = 1",
            r"\[text\] .* may have cache_entries, device, on_ranks, got 'cache'",
            id="unknown key",
        ),
        pytest.param(
            MODEL + '[text]\ndevice = "cuda"', r"\[text\] device .* one of '', 'cuda:0', .* got 'cuda'", id="no GPU"
        ),
        pytest.param(
            MODEL + "[limits]\nmax_seed = 1", r"\[limits\] .* may have .*max_steps.*, got 'max_seed'", id="limit"
        ),
        pytest.param("text = 3\n" + MODEL, r"text .* must be a table, got 3", id="no table"),
        pytest.param(MODEL + 'backend = "onnx"', r"\[model\] backend .* one of 'ort', .*, got 'onnx'", id="choice"),
        pytest.param(
            MODEL + "device = [1]", r"\[model\] device .* one of 'cpu', 'cuda', got \[1\]", id="list as choice"
        ),
        pytest.param('[model]\ndir = 1\nengines_dir = "x"', r"\[model\] dir .* a path, got 1", id="path"),
        pytest.param('[model]\ndir = ""\nengines_dir = "x"', r"\[model\] dir .* a path, got ''", id="empty path"),
        pytest.param(MODEL + "[video]\nfps = 25.0", r"\[video\] fps .* an integer, got 25.0", id="float as int"),
        pytest.param(MODEL + "[video]\nfps = true", r"\[video\] fps .* an integer, got True", id="bool as int"),
        pytest.param(MODEL + "[video]\ncrop = 1", r"\[video\] crop .* true or false, got 1", id="int as bool"),
        pytest.param(MODEL + "[denoiser]\nlayout = 1", r"\[denoiser\] layout .* a string, got 1", id="int as string"),
        pytest.param(
            MODEL + "[denoiser]\nstart_timeout_s = true",
            r"start_timeout_s .* a finite number, got True",
            id="bool as float",
        ),
        pytest.param(
            MODEL + "[denoiser]\nstart_timeout_s = nan", r"start_timeout_s .* a finite number, got nan", id="nan"
        ),
        pytest.param(
            MODEL + "[denoiser]\nstart_timeout_s = 1" + "0" * 400,
            r"start_timeout_s .* a finite number",
            id="huge integer",
        ),
        pytest.param(
            MODEL + "[limits]\ncfg_scale = [1.0]",
            r"cfg_scale .* a list \[a finite number, a finite number\]",
            id="short",
        ),
        pytest.param(
            MODEL + '[limits]\ncfg_scale = [1, "2"]', r"cfg_scale\[1\] .* a finite number, got '2'", id="item"
        ),
        pytest.param(MODEL + "[limits]\ncfg_scale = 1", r"cfg_scale .* a list .*, got 1", id="no list"),
        pytest.param(MODEL + "[limits]\nmax_steps = 0", r"\[limits\] .*max_steps must be", id="limit out of range"),
        pytest.param(MODEL + "[denoiser]\nthreads = -1", "threads must be at least 0, got -1", id="negative"),
        pytest.param(MODEL + "[text]\ncache_entries = -1", "cache_entries must be at least 0", id="negative cache"),
        pytest.param(
            MODEL + "[decoder]\nthreads = -1", r"\[decoder\] .*threads must be at least 0", id="negative threads"
        ),
        pytest.param(MODEL + "[video]\nfps = 0", "fps must be at least 1, got 0", id="no frames"),
        pytest.param(
            MODEL + "[limits]\nmax_steps = 9",
            r"\[defaults\] .* \[limits\] .*steps must be from 1 to 9, got 50",
            id="fill",
        ),
        pytest.param(MODEL + "[defaults]\nheight = 65", r"\[defaults\] .*height .* multiple of 16, got 65", id="grid"),
        pytest.param(
            MODEL + "[defaults]\nnum_frames = 204\nwidth = 1920", r"\[defaults\] .* 75888 tokens", id="too many tokens"
        ),
        pytest.param(MODEL + "[defaults]\ntime_shift = 0", r"\[defaults\] .*time_shift .* from 0.1", id="shift"),
        pytest.param(MODEL + "[defaults]\nseed = 1", r"\[defaults\] .* may have .*, got 'seed'", id="no default"),
        pytest.param(MODEL + "[card]\nsizes = [[34, 64]]", r"\[card\] sizes\[0\] .* a list", id="short size"),
        pytest.param(MODEL + "[card]\nsizes = [[34, 0, 64]]", r"\[card\] .* from 1 upwards", id="no size"),
        pytest.param(MODEL + "[card]\ncfg_scale = [5, 4]", r"\[card\] .* a range", id="range upside down"),
        pytest.param("[model", "must be TOML in UTF-8, found", id="no TOML"),
    ],
)
def test_refused_with_key_and_file(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as refusal:
        ServeConfig.load(path)
    assert str(path) in str(refusal.value)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_bytes(b'[model]\ndir = "\xff"\n')
    with pytest.raises(ConfigError, match="must be TOML in UTF-8"):
        ServeConfig.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        ServeConfig.load(tmp_path / "absent.toml")


def test_from_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, MODEL)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(path))
    assert ServeConfig.from_environment() == ServeConfig.load(path)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    with pytest.raises(ConfigError, match="STEPVIDEO_CONFIG must name the configuration file, it is not set"):
        ServeConfig.from_environment()


def test_the_committed_file_shows_every_key(root: Path) -> None:
    path = root / "serve.toml"
    config = ServeConfig.load(path)
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    for section in fields(config):
        if section.name == "presets":
            continue  # tests/sampling/test_presets.py
        assert set(table[section.name]) == {key.name for key in fields(getattr(config, section.name))}


def test_the_committed_file_shows_the_defaults(root: Path, tmp_path: Path) -> None:
    config = ServeConfig.load(root / "serve.toml")
    plain = ServeConfig.load(written(tmp_path, MODEL))
    assert config == replace(plain, model=config.model, defaults=config.defaults, card=config.card)
    assert config.model.dir == root / "toyworld" / "checkpoint"
    assert config.model.engines_dir == root / "build" / "toyworld"


def test_the_committed_file_says_what_the_toy_world_was_trained_and_evaluated_for(root: Path) -> None:
    config = ServeConfig.load(root / "serve.toml")
    assert config.defaults == RequestDefaults(FRAMES, SIZE_PX, SIZE_PX, STEPS, CFG_SCALE, TIME_SHIFT, 5.0)
    assert config.card == CheckpointCard(((FRAMES, SIZE_PX, SIZE_PX),), (CFG_SCALE, CFG_SCALE))
    card = (config.model.dir / "README.md").read_text(encoding="utf-8")
    assert f"Video is {SIZE_PX}x{SIZE_PX} pixels, {FRAMES} frames" in card
    assert f"{STEPS} steps, shift {TIME_SHIFT:g}, CFG {CFG_SCALE:g}" in " ".join(card.split())


def test_the_containers_card_states_the_official_defaults(root: Path) -> None:
    """They are all that is published of Step-Video-TI2V, with the size in portrait."""
    card, official = ServeConfig.load(root / "docker" / "serve.toml").card, RequestDefaults()
    size = (official.num_frames, official.height, official.width)
    assert card.sizes == (size, (official.num_frames, official.width, official.height))
    assert card.cfg_scale == (official.cfg_scale, official.cfg_scale)
