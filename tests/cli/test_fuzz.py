"""Whatever is typed: a config that composes and passes its checks, or one paragraph and exit code 2; never a hang."""

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
from ldm.files.untrusted import file_name, is_plain_name
from ldm.image_grid import grid, rows
from ldm.networks.conditioning import TextCondition
from ldm.runs.resume import Continuation
from ldm.runtime.paths import folder
from ldm.sampling.draw import write
from ldm.sampling.pipeline import LatentDiffusionPipeline
from ldm.sampling.request import Request, read_prompts
from ldm.tracking.artifact import flatten
from ldm.training import session

SLOWEST_S = 20.0
"""No command may take longer to be refused, on a busy machine."""
MORE_MEMORY = 2 * 1024**3
"""Bytes: what one training of these sizes may take, so that no number typed takes the machine's."""
SHORT = ["data=image_folder", "data.path=pictures", "data.resolution=16", "trainer=cpu", "trainer.max_steps=1"]
SHORT += ["trainer.precision=32-true", "batch_size=2", "logger=csv", "optimizer=adamw"]
SMALL = ["autoencoder.model.block_out_channels=[32]", "adversarial=hinge", "adversarial.layers=1"]
NETWORK = ["network.hidden_dim=16", "network.depth=1", "network.head_dim=8"]
STAGES = {
    "vae": ["stage=vae", *SHORT, *SMALL],
    "diffusion": ["stage=diffusion", *SHORT, "conditioning=none", "vae=identity", "network=dit", *NETWORK],
}
WILD = [
    *("1000000000000000000000000000000", "2147483648", "100000000", "-1", "-5", "0", "1.5", "1e400", "1e-320", "-0.0"),
    *("nan", "inf", "-inf", "null", "true", "false", "''", "", "~", "[]", "{}", "[1,[2]]", "[100000000]", "[null]"),
    *("{a:1}", "[a,b]", "1,2", "abc", "٣", "🅰️", "a\u0000b", "\ud800", "\u202e", "a\nb", "???", "\\", "../..", "/"),
    *("${seed}", "${nosuch}", "${oc.env:NOSUCH}", "${seed", "${oc.decode:x}", "a=b", "x" * 5000, "os.system"),
]
PARTS = 12
"""Of the keys: a minute each."""
ENDS: Counter[str] = Counter()


class Hung(BaseException):
    """A command took too long."""


class Reached(BaseException):
    """All checks were passed, and training would begin now, or something else that takes long or leaves the folder."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_images):
    """A folder of pictures, prepared; commands end where they would train, and read each yaml of conf/ once."""
    place = tmp_path_factory.mktemp("fuzz")
    make_images(place / "pictures", 4, size=8)
    known: dict[tuple[str, str], object] = {}
    read = FileConfigSource.load_config

    def load(self, config_path):
        key = (self.path, config_path)
        if key not in known:
            known[key] = read(self, config_path)
        return copy.deepcopy(known[key])

    def reached(*_, **__):
        raise Reached

    def inside(*arguments, **options):
        made = plan(*arguments, **options)
        return made if made.folder.resolve().is_relative_to(place) else reached()

    def without_wandb(config, *arguments, **options):
        return reached() if config.wandb else make_loggers(config, *arguments, **options)

    plan, make_loggers = Continuation.plan, session.make_loggers
    prepare(ImageFolder(place / "pictures"), resolution=16, cache_dir=place / "cache", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("LDM_CACHE", str(place / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(FileConfigSource, "load_config", load)
        patch.setattr(ldm.data.images, "fill_cache", reached)
        patch.setattr(Continuation, "plan", inside)
        patch.setattr(session, "make_loggers", without_wandb)
        patch.setattr(Trainer, "fit", reached)
        with bounded_memory():
            yield place


@contextlib.contextmanager
def bounded_memory():
    """Not much more memory than now; no bound where the system has no such limits, as on Windows and macOS."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MORE_MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def keys() -> dict[str, list[str]]:
    """Every key of a training's config."""
    found = {}
    for stage, arguments in STAGES.items():
        with initialize_config_dir(str(folder("conf")), version_base="1.3"):
            config = compose("train", arguments)
        found[stage] = [key for key in flatten(OmegaConf.to_container(config)) if not key.startswith("stage.")]
    return found


def ended(main, *arguments: str) -> str:
    """How a command ended; anything but a paragraph or the end of its checks is a fault."""

    def hung(*_):
        raise Hung(arguments)

    said = io.StringIO()
    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, SLOWEST_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        for name in ("HYDRA_FULL_ERROR", "LDM_RUN_NAME"):
            patch.setenv(name, "")
            patch.delenv(name)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                main()
            how = "ended"
        except Reached:
            how = "reached"
        except SystemExit as stopped:
            assert stopped.code == 2, (arguments, stopped.code)
            how = "refused"
            lines = said.getvalue().removesuffix("\n").split("\n")
            assert lines[-1].startswith(("error: ", "command: error: ")) and len(lines[-1]) < 20_000, said.getvalue()
            assert "Traceback" not in said.getvalue(), said.getvalue()
            assert lines[0].startswith("usage: ") or len(lines) == 1, said.getvalue()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            torch.set_flush_denormal(False)
            shutil.rmtree("runs", ignore_errors=True)
    ENDS[how] += 1
    return how


values = st.one_of(
    st.sampled_from(WILD),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
    st.lists(st.integers(-3, 300), max_size=4).map(str),
)


def typed(keys: list[str]) -> st.SearchStrategy[list[str]]:
    """One to three arguments; most of them give one of our keys another value."""
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
    @given(typed(keys[stage]))
    def run(arguments: list[str]) -> None:
        # help and shell completion are Hydra's own, and another command's job than training
        kept = [argument for argument in arguments if not argument.startswith("-")]
        ended(ldm.train.main, *STAGES[stage], *kept)

    run()


@pytest.mark.parametrize("stage", STAGES)
def test_any_override_is_taken_or_refused_in_a_paragraph(place, keys, stage):
    assert ended(ldm.train.main, *STAGES[stage]) == "reached", "as it stands it passes"
    fuzz_overrides(stage, keys, 20)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_any_override_at_length(place, keys, stage):
    fuzz_overrides(stage, keys, 500)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("stage", STAGES)
def test_every_key_with_every_wild_value(place, keys, stage, part, monkeypatch):
    """Ten thousand: only as far as the preparation of images."""
    monkeypatch.setattr(ldm.data.images, "damage", lambda _: "it is not there")
    for key in keys[stage][part::PARTS]:
        for value in WILD:
            ended(ldm.train.main, *STAGES[stage], f"{key}={value}")


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
def text(tmp_path_factory) -> TextCondition:
    """A text encoder of one layer."""
    place = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "x"]
    (place / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(place)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(place)
    return TextCondition(str(place), max_tokens=8)


def draw_with(prompt: str, text: TextCondition, place: Path) -> None:
    """A prompt's way: to the network, onto pictures, into samples.json and into names."""
    pipeline = LatentDiffusionPipeline(None, None, None, "v", text, None, (3, 8, 8))
    request = Request.make(pipeline, prompt=prompt, num_samples=2)
    assert all(value.isfinite().all() and len(value) == 2 for value in request.condition.values())
    images = [Image.new("RGB", (8, 8))] * 2
    write(place / "drawn", images, request.captions, {"seed": 0})
    grid(images, [prompt, None], title=prompt[:100])
    rows([(prompt, images), ("", images)], captions=[prompt, prompt])
    assert is_plain_name(file_name(prompt)) and len(file_name(prompt).encode()) <= 100
    (place / "drawn" / file_name(prompt)).write_text("a name that a disk takes")
    (place / "prompts.txt").write_bytes(prompt.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        read_prompts(str(place / "prompts.txt"))


def sample_with(prompt: str) -> None:
    """Through tools/sample.py's command line: as it was typed, or refused."""
    seen = []
    how = ended(lambda: command.run("sample", seen.append), "run=x", f"prompt={prompt}")
    if how == "refused":
        assert re.search("[\0\ud800-\udfff]", prompt) or prompt == "???", prompt  # which is how YAML writes: required
    else:
        assert seen[0].prompt == (None if prompt == "null" else prompt)


def fuzz_prompts(text: TextCondition, place: Path, examples: int) -> None:
    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(prompts)
    @example("")
    def run(prompt: str) -> None:
        draw_with(prompt, text, place)

    run()


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt)[:30])
def test_a_prompt_of_any_text(text, place, prompt):
    began = time.perf_counter()
    draw_with(prompt, text, place)
    sample_with(prompt)
    assert time.perf_counter() - began < SLOWEST_S


def test_prompts_at_random(text, place):
    fuzz_prompts(text, place, 40)


@pytest.mark.slow
def test_prompts_at_length(text, place):
    fuzz_prompts(text, place, 5000)


def test_a_process_takes_no_bytes_for_text(place):
    """What a terminal of another encoding sends arrives as lone surrogates."""
    broken = os.fsdecode(b"prompt=\xff\xfe")
    assert ended(lambda: command.run("sample", lambda _: None), "run=x", broken) == "refused"
