"""tools/latents.py sweep=...: what is planned, kept, continued and refused, which size is recommended and shown."""

import itertools
import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm.cli.arguments import quote_free_text
from ldm.errors import UserError
from ldm.evaluation.latents import sweep_runs as runs
from ldm.evaluation.latents.sweep import (
    LOSSES,
    LatentSize,
    format_duration,
    parse_list,
    parse_losses,
    parse_sizes,
    plan_trainings,
)
from ldm.evaluation.latents.sweep_figure import plot_size_sweep
from ldm.evaluation.latents.sweep_report import recommend_size
from ldm.runs.run import Run
from ldm.runtime.paths import folder

ROOT = Path(__file__).parents[3]
TINY = "trainer=cpu,trainer.precision=32-true,trainer.max_steps=3,batch_size=8,val_images=8,logger=csv"


def latents() -> None:
    runpy.run_path(str(folder("tools") / "latents.py"), run_name="__main__")


@pytest.fixture(autouse=True)
def in_place(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def trainings(sweep: str = "f4c4,f8c16", losses: str = "plain", extra: tuple[str, ...] = (), minutes: float = 2):
    sizes = parse_sizes(sweep, 32)
    return plan_trainings(sizes, parse_losses(losses), minutes=minutes, data=["data=openmoji"], extra=extra)


def test_sizes():
    assert parse_sizes("f4c4, f8c16,f1c3", 32) == [LatentSize(4, 4), LatentSize(8, 16), LatentSize(1, 3)]
    assert [str(size) for size in parse_sizes("f16c32", 64)] == ["f16c32"]
    assert LatentSize(8, 16).num_values(32) == 16 * 4 * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("f4", "'f4' is no latent size.*sweep=f4c4,f8c16"),
        ("f4c4,,f8c4", "'' is no latent size"),
        ("f0c4", "'f0c4' is no latent size"),
        ("F4C4", "'F4C4' is no latent size"),
        ("f6c4", "f = 6 of f6c4 must be a power of 2"),
        ("f64c4", "f = 64 of f64c4 must divide data.resolution=32. .*data.resolution=64"),
        ("f2c13", r"f2c13 has more channels than the 3 f\^2 = 12 values of a patch"),
        ("f4c4,f4c4", "f4c4 is named twice"),
    ],
)
def test_sizes_that_are_none(text, said):
    with pytest.raises(UserError, match=said):
        parse_sizes(text, 32)


def test_losses_and_lists_and_minutes():
    assert parse_losses("plain,adversarial") == ["plain", "adversarial"]
    assert parse_list(None) == parse_list("[]") == []
    assert parse_list("[batch_size=64, optimizer.build.betas=[0.9,0.95],a='b,c']") == [
        "batch_size=64",
        "optimizer.build.betas=[0.9,0.95]",
        "a='b,c'",
    ]
    assert [format_duration(minutes) for minutes in (0.05, 2, 90.5)] == ["00:00:03", "00:02:00", "01:30:30"]
    for wrong, said in (("l2", "'l2' is unknown. Choose one or more of: plain, adversarial"), ("plain,plain", "twice")):
        with pytest.raises(UserError, match=said):
            parse_losses(wrong)
    for wrong in ("[batch_size]", "[a=[1,2]", "[a='b]"):
        with pytest.raises(UserError, match="must be a list of overrides"):
            parse_list(wrong)
    for wrong in (0, -1, "2 h", True, None, float("inf"), float("nan")):
        with pytest.raises(UserError, match="minutes=.* must be a number of minutes"):
            format_duration(wrong)


@pytest.mark.parametrize("name", ["f1c2", "f2c12", "f4c4", "f8c16", "f16c24", "f32c8"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_plan_makes_what_it_says(name, loss):
    (training,) = trainings(name, loss, ("batch_size=7",))
    assert training.name == f"{name}-{loss}"
    _, front, *arguments = training.arguments(Path("a place/s"))
    with initialize_config_dir(str(folder("conf")), version_base="1.3"):
        config = compose("train", quote_free_text(arguments))
    assert (front, config.name, config.runs_dir) == ("ldm.train", training.name, "a place/s")
    assert config.trainer.max_time == "00:02:00" and config.batch_size == 7
    with torch.device("meta"):
        model = instantiate(config.autoencoder.model)(sample_size=32)
        latent = model.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    size = training.size
    assert latent.shape == (1, size.channels, 32 // size.factor, 32 // size.factor)


def test_every_size_with_every_loss():
    names = [training.name for training in trainings("f4c4,f8c16", "plain,adversarial")]
    assert names == ["f4c4-plain", "f4c4-adversarial", "f8c16-plain", "f8c16-adversarial"]


@pytest.mark.parametrize(
    "option", ["name=a", "data.resolution=8", "autoencoder.model.patch=2", "trainer.max_time=null", "+data.flip=true"]
)
def test_what_the_sweep_sets_is_set_once(option):
    with pytest.raises(UserError, match=rf"train=\[{option.lstrip('+').partition('=')[0]}=...\] is set by the sweep"):
        trainings(extra=(option,))


class Trainer:
    """Stands in for the processes: a run folder for each command, finished unless told otherwise."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.codes = itertools.repeat(0)

    def __call__(self, command) -> int:
        self.commands.append(command[1:])
        options = dict(argument.split("=", 1) for argument in command[3:])
        place, code = Path(options["runs_dir"], "vae", options["name"]), next(self.codes)
        run = Run.create(place, OmegaConf.create({}), {"stage": "vae", "finished": None if code else 1.0})
        if code:
            (place / "checkpoints").mkdir(exist_ok=True)
            (place / "checkpoints/step-00000001.json").touch()
        assert run.finished == (not code)
        return code


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    found = Trainer()
    monkeypatch.setattr(runs, "run_process", found)
    return found


def test_what_is_finished_is_kept_and_sizes_can_be_added(trainer, capsys):
    runs.run_trainings(trainings(), Path("sweep"))
    assert [command[3] for command in trainer.commands] == ["name=f4c4-plain", "name=f8c16-plain"]
    assert "1 of 2: f4c4 plain: new" in capsys.readouterr().out
    runs.run_trainings(trainings("f4c4,f4c8,f8c16"), Path("sweep"))
    assert [command[3] for command in trainer.commands[2:]] == ["name=f4c8-plain"]
    printed = capsys.readouterr().out
    assert "1 of 3: f4c4 plain: finished, kept" in printed and "2 of 3: f4c8 plain: new" in printed
    assert len(json.loads(Path("sweep/sweep.json").read_text())["trainings"]) == 3


@pytest.mark.parametrize("checkpoint", [True, False])
def test_what_was_interrupted_goes_on(trainer, capsys, checkpoint):
    trainer.codes = iter([130, 0, 0])
    with pytest.raises(KeyboardInterrupt):
        runs.run_trainings(trainings(), Path("sweep"))
    assert "f4c4-plain was stopped. The same command goes on from there." in capsys.readouterr().err
    if not checkpoint:
        Path("sweep/vae/f4c4-plain/checkpoints/step-00000001.json").unlink()
    runs.run_trainings(trainings(), Path("sweep"))
    first, again, second = trainer.commands
    assert again == [*first, "resume=true" if checkpoint else "overwrite=true"] and second[3] == "name=f8c16-plain"
    assert "1 of 2: f4c4 plain: continued" in capsys.readouterr().out


def test_a_failure_ends_the_sweep_and_keeps_the_rest(trainer):
    trainer.codes = iter([0, 2])
    with pytest.raises(
        UserError, match="The training f8c16-plain in sweep/vae/f8c16-plain ended with exit code 2"
    ) as e:
        runs.run_trainings(trainings("f4c4,f8c16,f4c8"), Path("sweep"))
    assert shlex.join(["python", *trainer.commands[-1]]) in str(e.value) and len(trainer.commands) == 2
    assert Run.open("sweep/vae/f4c4-plain").finished


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"minutes": 3}, "trainer.max_time = 00:02:00, and this command asks for 00:03:00"),
        ({"extra": ("seed=1",)}, r"seed = \(default\), and this command asks for 1"),
    ],
)
def test_other_options_are_refused_before_any_training(trainer, other, said):
    runs.run_trainings(trainings("f8c16"), Path("sweep"))
    with pytest.raises(UserError, match=f"{said}. Choose another name=, or delete the folder sweep/vae/f8c16-plain"):
        runs.run_trainings(trainings("f4c4,f8c16", **other), Path("sweep"))
    assert len(trainer.commands) == 1
    Path("sweep/sweep.json").unlink()
    with pytest.raises(UserError, match="holds a run of which sweep/sweep.json knows nothing"):
        runs.run_trainings(trainings("f8c16"), Path("sweep"))


@pytest.mark.parametrize("content", [b"", b"\x00" * 99, b"[]", b'{"trainings": []}', b'{"trainings": {"a": 1}}'])
def test_a_damaged_file_of_a_sweep_is_refused_by_name(trainer, content):
    file = Path("sweep/sweep.json")
    file.parent.mkdir()
    file.write_bytes(content)
    for ask in (runs.run_trainings, lambda *options: runs.training_table(*options, 32)):
        with pytest.raises(UserError, match="sweep/sweep.json.* Or choose another name=; .*left as they are"):
            ask(trainings("f8c16"), Path("sweep"))
    assert not trainer.commands and file.read_bytes() == content


def test_a_sweep_keeps_its_file_where_a_new_one_cannot_be_written(tmp_path, monkeypatch):
    file = runs.update_sweep_file(tmp_path, trainings={})

    def full(path):
        raise OSError("no room")

    monkeypatch.setattr("ldm.files.atomic.sync", full)
    with pytest.raises(OSError, match="no room"):
        runs.update_sweep_file(tmp_path, report={})
    assert json.loads(file.read_text()) == {"trainings": {}} and list(tmp_path.iterdir()) == [file]


def test_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    script = "import os, sys; sys.exit(7 + ('HYDRA_FULL_ERROR' in os.environ))"
    assert runs.run_process([sys.executable, "-c", script]) == 7


def row(size: str, psnr_db: float, loss: str = "plain", fd: float | None = None, in_loss: bool = False) -> dict:
    factor, channels = map(int, size[1:].split("c"))
    return {
        "name": f"{size}-{loss}",
        "size": size,
        "factor": factor,
        "loss": loss,
        "num_values": channels * (32 // factor) ** 2,
        "kl_bits": 3 * channels * (32 // factor) ** 2,
        "psnr_db": psnr_db,
        "psnr_db_standard_error": 0.3,
        "pca_psnr_db": psnr_db - 1,
        "gain_db": 1.0,
        "fd": fd,
        "fd_components": 43,
        "features_in_loss": in_loss,
    }


def test_the_smallest_size_that_is_good_enough():
    rows = [row("f4c16", 28), row("f4c4", 25.5), row("f8c16", 26), row("f8c4", 20)]
    found = recommend_size(rows, 25.0)
    assert (found["rule"], found["name"]) == ("smallest", "f8c16-plain"), "as small as f4c4, and better"
    assert "26.00 dB on held-out images" in found["text"] and "target_psnr_db=25" in found["text"]
    assert "FD" not in found["text"]
    assert recommend_size(rows, 27)["size"] == "f4c16" and recommend_size(rows, 19)["size"] == "f8c4"


def test_no_size_is_good_enough():
    found = recommend_size([row("f4c16", 28), row("f8c4", 20)], 30.0)
    assert (found["rule"], found["name"]) == ("best", "f4c16-plain")
    assert "no size reaches target_psnr_db=30" in found["text"] and "Try more minutes=" in found["text"]
    assert "1.5 dB below a PCA" in recommend_size([{**row("f8c4", 20), "gain_db": -1.5}], 30.0)["text"]


def test_losses_of_the_recommended_size_are_compared():
    rows = [row("f4c4", 26, fd=9), row("f4c4", 25.2, "adversarial", fd=4)]
    found = recommend_size(rows, 25.0)
    assert (
        found["name"] == "f4c4-adversarial" and "adversarial has the lower FD: 4, against 9 with plain" in found["text"]
    )
    assert recommend_size(rows, 25.5)["name"] == "f4c4-plain", "the other one does not reach the target"
    shared = recommend_size([rows[0], {**rows[1], "features_in_loss": True}], 25.0)
    assert shared["name"] == "f4c4-plain" and "proves nothing" in shared["text"]


def figures_of(rows: list[dict], recommended: str) -> dict:
    curve = {"num_values": [64, 256, 1024], "psnr_db": [18, 22, 26]}
    return {
        "rows": rows,
        "pca": {str(r["factor"]): curve for r in rows},
        "resolution": 32,
        "num_images": 87,
        "images": "squares/val@0123",
        "features": "none" if rows[0]["fd"] is None else "efficientnet_lite",
        "target_psnr_db": 25.0,
        "recommendation": {"size": recommended.partition("-")[0], "name": recommended},
    }


@pytest.mark.parametrize("fd", [None, 3.0])
def test_labels_stand_apart(fd):
    """Sizes of equally many values, whose distortions are nearly equal."""
    pairs = itertools.product(("f4c4", "f8c16", "f2c1", "f4c16"), enumerate(("plain", "adversarial")))
    rows = [row(size, 24 + len(size) / 9 - i / 5, loss, fd, bool(i)) for size, (i, loss) in pairs]
    figure = plot_size_sweep(figures_of(rows, "f4c4-plain"))
    assert len(figure.axes) == (2 if fd is None else 3)
    for axes in figure.axes[:2]:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("f")]
        assert len(boxes) == len(rows)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert all(axes.get_window_extent().contains(box.x0, box.y0) for box in boxes)


def test_one_run_can_be_drawn_and_codes_without_a_density(tmp_path):
    plot_size_sweep(figures_of([row("f4c4", 25)], "f4c4-plain")).savefig(tmp_path / "one.png")
    plot_size_sweep({**figures_of([row("f4c4", 25)], "f4c4-plain"), "target_psnr_db": 99}).savefig(tmp_path / "far.png")
    codes = plot_size_sweep(figures_of([{**row("f4c4", 25), "kl_bits": None}], "f4c4-plain"))
    assert [axes.get_title() for axes in codes.axes] == ["Distortion by size"]


def test_a_sweep_from_the_command_line(call, make_images, tmp_path, monkeypatch):
    make_images(tmp_path / "my squares, small", 60)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = ["data=image_folder", f"data.path={tmp_path / 'my squares, small'}", "data.resolution=16"]
    options = [*data, "data.val_fraction=0.2", f"train=[{TINY}]", "features=none", "device=cpu", "name=mine"]
    ended = call(latents, "sweep=f2c3,f4c4", "minutes=1", "target_psnr_db=5", *options)
    assert ended.code == 0, ended
    place = Path("runs/sweeps/mine")
    written = json.loads((place / "sweep.json").read_text())
    found = written["report"]
    small, large = sorted(found["rows"], key=lambda r: r["num_values"])
    assert (small["size"], small["latent_shape"], small["compression"]) == ("f4c4", [4, 4, 4], 12)
    assert (large["size"], large["num_values"], large["steps"]) == ("f2c3", 192, 3)
    for measured in (small, large):
        run = Run.open(measured["run"])
        assert run.finished and run.path == place / "vae" / f"{measured['size']}-plain"
        assert measured["psnr_db"] == pytest.approx(run.facts["figures"]["psnr_db"], abs=0.05), (
            "all images are measured"
        )
        assert measured["kl_bits"] > 0 and measured["fd"] is None
        curve = found["pca"][str(measured["factor"])]
        of_its_size = dict(zip(curve["num_values"], curve["psnr_db"], strict=True))[measured["num_values"]]
        assert measured["pca_psnr_db"] == pytest.approx(of_its_size, abs=1e-3)
        assert f"{measured['psnr_db']:.2f}" in ended.out and f"{measured['gain_db']:+.2f}" in ended.out
    assert found["recommendation"]["name"] == "f4c4-plain" and f"Recommendation: {small['size']}" in ended.out
    assert "autoencoder.model.latent_channels=4" in ended.out and "trainer.max_time=00:10:00" in ended.out
    chosen = Run.open(place / "vae/f4c4-plain")
    assert chosen.next_training() in ended.out and "data=image_folder" in chosen.next_training()
    assert "2 of 2: f4c4 plain: new" in ended.out and "2 x 1 = 2 minutes" in ended.out
    assert (place / "sweep.png").stat().st_size > 10_000

    monkeypatch.setattr(runs, "run_process", lambda _: pytest.fail("it is finished"))
    again = call(latents, "sweep=f4c4", "minutes=1", "target_psnr_db=99", *options)
    assert again.code == 0 and "all are finished" in again.out and "no size reaches" in again.out, again
    other = call(latents, "sweep=f4c4", "minutes=2", *options)
    assert other.code == 2 and "trainer.max_time = 00:01:00, and this command asks for 00:02:00" in other.err, other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Give one of run= and sweep="),
        (["run=somewhere", "sweep=f4c4"], "Give one of run= and sweep="),
        (["sweep=f4c4,f5c4"], "f = 5 of f5c4 must be a power of 2"),
        (["sweep=f4c4", "losses=plain,l2"], "'l2' is unknown"),
        (["sweep=f4c4", "minutes=0"], "minutes=0 must be"),
        (["sweep=f4c4", "train=[nonsense]"], "must be a list of overrides"),
        (["sweep=f4c4", "features=resnet"], "features=resnet is unknown"),
        (["sweep=f4c4", "target_psnr_db=high"], "target_psnr_db=high must be a number"),
        (["sweep=f4c4", "num_images=1"], "num_images=1 must be a whole number of 2 at least"),
        (["sweep=f4c4", "batch_size=0"], "batch_size=0 must be a whole number of 1 at least"),
        (["sweep=f4c4", "seed=1.5"], "seed=1.5 must be a whole number."),
        (["sweep=f4c4", "name=a/b"], "name=a/b must be a plain folder name"),
        (["sweep=f4c4", "data.resolution=big"], "data.resolution=big must be a whole number"),
    ],
)
def test_mistakes_on_the_command_line(call, monkeypatch, arguments, said):
    monkeypatch.setattr(runs, "run_process", lambda _: pytest.fail("trained first"))
    ended = call(latents, *arguments)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended
