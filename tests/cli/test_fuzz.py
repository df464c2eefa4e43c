"""Fuzz the command line: every input passes all checks or is rejected in one paragraph, and no command hangs."""

import contextlib
import copy
import io
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

import ldm.data.images
import ldm.train
from ldm.cli import main as command
from ldm.data.images import prepare
from ldm.data.sources.image_folder import ImageFolder
from ldm.errors import UserError
from ldm.files.untrusted import is_plain_name, to_file_name
from ldm.image_grid import grid, labelled_rows
from ldm.networks.conditioning import TextCondition
from ldm.runs.resume import ResumePlan
from ldm.runtime.paths import bundled_folder
from ldm.sampling.draw import write_samples
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import Request, read_prompts
from ldm.tracking.artifact import flatten
from ldm.training import session

TIMEOUT_S = 20.0
"""Maximum time for a command to reject its input on a busy machine."""
MEMORY_LIMIT = 2 * 1024**3
"""Bytes that a command can allocate, so that huge option values do not exhaust the machine's memory."""
SHORT_RUN = ["data=image_folder", "data.path=images", "data.resolution=16", "trainer=cpu", "trainer.max_steps=1"]
SHORT_RUN += ["trainer.precision=32-true", "batch_size=2", "logger=csv", "optimizer=adamw"]
SMALL_MODELS = ["autoencoder.model.block_out_channels=[32]", "adversarial=hinge", "adversarial.layers=1"]
SMALL_NETWORK = ["network.hidden_dim=16", "network.depth=1", "network.head_dim=8"]
STAGES = {
    "vae": ["stage=vae", *SHORT_RUN, *SMALL_MODELS],
    "diffusion": ["stage=diffusion", *SHORT_RUN, "conditioning=none", "vae=identity", "network=dit", *SMALL_NETWORK],
}
WILD_VALUES = [
    *("1000000000000000000000000000000", "2147483648", "100000000", "-1", "-5", "0", "1.5", "1e400", "1e-320", "-0.0"),
    *("nan", "inf", "-inf", "null", "true", "false", "''", "", "~", "[]", "{}", "[1,[2]]", "[100000000]", "[null]"),
    *("{a:1}", "[a,b]", "1,2", "abc", "٣", "🅰️", "a\u0000b", "\ud800", "\u202e", "a\nb", "???", "\\", "../..", "/"),
    *("${seed}", "${nosuch}", "${oc.env:NOSUCH}", "${seed", "${oc.decode:x}", "a=b", "x" * 5000, "os.system"),
]
NUM_SHARDS = 12
"""Number of shards of the key list. Each shard takes about a minute."""
OUTCOMES: Counter[str] = Counter()


class CommandTimeout(BaseException):
    """Raised if a command takes too long."""


class ChecksPassed(BaseException):
    """Raised after all checks have passed, in place of training and other slow steps."""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, make_images):
    """Working directory with prepared images. Commands stop before training, and config files are cached."""
    workdir = tmp_path_factory.mktemp("fuzz")
    make_images(workdir / "images", 4, size=8)
    configs: dict[tuple[str, str], object] = {}
    load_config = FileConfigSource.load_config

    def load_cached(self, config_path):
        key = (self.path, config_path)
        if key not in configs:
            configs[key] = load_config(self, config_path)
        return copy.deepcopy(configs[key])

    def stop(*_, **__):
        raise ChecksPassed

    def plan_in_workdir(*arguments, **options):
        plan = from_config(*arguments, **options)
        return plan if plan.folder.resolve().is_relative_to(workdir) else stop()

    def make_local_loggers(config, *arguments, **options):
        return stop() if config.wandb else make_loggers(config, *arguments, **options)

    from_config, make_loggers = ResumePlan.from_config, session.make_loggers
    prepare(ImageFolder(workdir / "images"), resolution=16, cache_dir=workdir / "cache", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir)
        patch.setenv("LDM_CACHE", str(workdir / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(FileConfigSource, "load_config", load_cached)
        patch.setattr(ldm.data.images, "fill_cache", stop)
        patch.setattr(ResumePlan, "from_config", plan_in_workdir)
        patch.setattr(session, "make_loggers", make_local_loggers)
        patch.setattr(Trainer, "fit", stop)
        with bounded_memory():
            yield workdir


@contextlib.contextmanager
def bounded_memory():
    """Limit further memory allocation. On Windows and macOS, this has no effect."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def keys() -> dict[str, list[str]]:
    """All config keys of a training run, by stage."""
    keys = {}
    for stage, arguments in STAGES.items():
        with initialize_config_dir(str(bundled_folder("conf")), version_base="1.3"):
            config = compose("train", arguments)
        keys[stage] = [key for key in flatten(OmegaConf.to_container(config)) if not key.startswith("stage.")]
    return keys


def run_command(main, *arguments: str) -> str:
    """Run a command and return "passed", "rejected" or "completed". Any other outcome fails the test."""

    def time_out(*_):
        raise CommandTimeout(arguments)

    stderr = io.StringIO()
    previous_handler = signal.signal(signal.SIGALRM, time_out)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        for name in ("HYDRA_FULL_ERROR", "LDM_RUN_NAME"):
            patch.setenv(name, "")
            patch.delenv(name)
        try:
            with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
                main()
            outcome = "completed"
        except ChecksPassed:
            outcome = "passed"
        except SystemExit as exited:
            assert exited.code == 2, (arguments, exited.code)
            outcome = "rejected"
            lines = stderr.getvalue().removesuffix("\n").split("\n")
            assert lines[-1].startswith(("error: ", "command: error: ")) and len(lines[-1]) < 20_000, stderr.getvalue()
            assert "Traceback" not in stderr.getvalue(), stderr.getvalue()
            assert lines[0].startswith("usage: ") or len(lines) == 1, stderr.getvalue()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous_handler)
            torch.set_flush_denormal(False)
            shutil.rmtree("runs", ignore_errors=True)
    OUTCOMES[outcome] += 1
    return outcome


values = st.one_of(
    st.sampled_from(WILD_VALUES),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
    st.lists(st.integers(-3, 300), max_size=4).map(str),
)


def argument_lists(keys: list[str]) -> st.SearchStrategy[list[str]]:
    """Generate one to three arguments, most of which set an existing key to a different value."""
    override = st.builds(str.__add__, st.sampled_from([f"{key}=" for key in keys]), values)
    prefixed = st.builds(str.__add__, st.sampled_from(["+", "++", "~"]), override)
    return st.lists(st.one_of(override, override, override, prefixed, st.text(max_size=30)), min_size=1, max_size=3)


def fuzz_overrides(stage: str, keys: dict[str, list[str]], examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(argument_lists(keys[stage]))
    def run(arguments: list[str]) -> None:
        # options that start with a dash belong to Hydra: help, shell completion and others
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        run_command(ldm.train.main, *STAGES[stage], *overrides)

    run()


@pytest.mark.parametrize("stage", STAGES)
def test_random_overrides_pass_or_are_rejected(workdir, keys, stage):
    assert run_command(ldm.train.main, *STAGES[stage]) == "passed", "without overrides the checks must pass"
    fuzz_overrides(stage, keys, 20)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_many_random_overrides_pass_or_are_rejected(workdir, keys, stage):
    fuzz_overrides(stage, keys, 500)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
@pytest.mark.parametrize("stage", STAGES)
def test_every_key_passes_or_is_rejected_with_every_wild_value(workdir, keys, stage, shard, monkeypatch):
    """Run about 10,000 commands, which stop before images are prepared."""
    monkeypatch.setattr(ldm.data.images, "find_cache_damage", lambda _: "missing")
    for key in keys[stage][shard::NUM_SHARDS]:
        for value in WILD_VALUES:
            run_command(ldm.train.main, *STAGES[stage], f"{key}={value}")


PROMPTS = [
    *("", " ", "red", "red " * 2500, "x" * 10_000, "🅰️" * 3000, "👨‍👩‍👧‍👦 ❤️", "قلب أحمر"),
    *("לב אדום \u202e\u202dabc", "a\u0000b", "\u0000", "\x01\x02\x1b[31mred\x7f"),
    *("\u200b\u200c\u200d\ufeff", "\ud800", "a\udfffb", "two\nlines", "\r\n\t", "\u2028\u2029"),
    *("${oc.env:HOME}", "\\", '"', "'", "a=b", "[1, 2", "{", "../../etc/passwd", "$(touch x)"),
    *("漢字" * 50, "e\u0301" * 200),
    *("null", "true", "8", "???", "--help", "%s %d {0}", "<script>alert(1)</script>", "ﷺ" * 100, "\U000e0041" * 20),
]
prompts = st.one_of(st.sampled_from(PROMPTS), st.text(st.characters(codec=None), max_size=200))


@pytest.fixture(scope="module")
def text_condition(tmp_path_factory) -> TextCondition:
    """Text conditioning with a one-layer encoder."""
    workdir = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "x"]
    (workdir / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(workdir / "vocab.txt")).save_pretrained(workdir)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(workdir)
    return TextCondition(str(workdir), max_tokens=8)


def use_prompt(prompt: str, text_condition: TextCondition, workdir: Path) -> None:
    """Use a prompt wherever prompts appear: in the network, on figures, in samples.json and in file names."""
    pipeline = LatentDiffusion(None, None, None, "v", text_condition, None, (3, 8, 8))
    request = Request.from_options(pipeline, prompt=prompt, num_samples=2)
    assert all(value.isfinite().all() and len(value) == 2 for value in request.condition.values())
    images = [Image.new("RGB", (8, 8))] * 2
    write_samples(workdir / "samples", images, request.captions, {"seed": 0})
    grid(images, [prompt, None], title=prompt[:100])
    labelled_rows([(prompt, images), ("", images)], captions=[prompt, prompt])
    assert is_plain_name(to_file_name(prompt)) and len(to_file_name(prompt).encode()) <= 100
    (workdir / "samples" / to_file_name(prompt)).write_text("the name is valid")
    (workdir / "prompts.txt").write_bytes(prompt.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        read_prompts(str(workdir / "prompts.txt"))


def sample_prompt(prompt: str) -> None:
    """Pass a prompt to tools/sample.py, and check that it reaches the config verbatim or is rejected."""
    configs = []
    outcome = run_command(lambda: command.run("sample", configs.append), "run=x", f"prompt={prompt}")
    if outcome == "rejected":
        # OmegaConf treats ??? as a missing value
        assert re.search("[\0\ud800-\udfff]", prompt) or prompt == "???", prompt
    else:
        assert configs[0].prompt == (None if prompt == "null" else prompt)


def fuzz_prompts(text_condition: TextCondition, workdir: Path, examples: int) -> None:
    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(prompts)
    @example("")
    def run(prompt: str) -> None:
        use_prompt(prompt, text_condition, workdir)

    run()


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt)[:30])
def test_unusual_prompts_are_handled(text_condition, workdir, prompt):
    start = time.perf_counter()
    use_prompt(prompt, text_condition, workdir)
    sample_prompt(prompt)
    assert time.perf_counter() - start < TIMEOUT_S


def test_random_prompts_are_handled(text_condition, workdir):
    fuzz_prompts(text_condition, workdir, 40)


@pytest.mark.slow
def test_many_random_prompts_are_handled(text_condition, workdir):
    fuzz_prompts(text_condition, workdir, 5000)


def test_invalid_utf8_is_rejected(workdir):
    """Bytes from a terminal with a different encoding arrive as lone surrogates."""
    argument = os.fsdecode(b"prompt=\xff\xfe")
    assert run_command(lambda: command.run("sample", lambda _: None), "run=x", argument) == "rejected"
