"""ldm.evaluation.reconstructions.curves: what is read of a metrics.csv, and what is drawn of it."""

import pytest

from ldm.evaluation.reconstructions.curves import plot_training, read_curves

PLAIN = "epoch,step,train/l1,val/psnr_db\n0,9,0.5,\n0,9,,20.5\n0,19,0.4,\n"
GAME = """epoch,step,train/l1,train/adversarial,train/adaptive_weight,train/discriminator_accuracy,val/psnr_db
0,9,0.5,,,,
0,9,,,,,20.5
0,19,0.4,0.1,2.5,0.6,
0,29,0.3,0.2,1.5,0.7,
"""


KILLED = "epoch,step,train/l1,val/psnr_db\n0,9,0.5,\n0,19,0.4,\n0,29,0.3,\n0,14,0.48,\n0,19,0.45,20.0\n0,29,0.35,\n"


@pytest.mark.parametrize(
    ("text", "l1", "psnr_db"),
    [
        (PLAIN, ([9, 19], [0.5, 0.4]), ([9], [20.5])),
        (KILLED, ([9, 14, 19, 29], [0.5, 0.48, 0.45, 0.35]), ([19], [20.0])),  # of a step logged twice the last counts
    ],
)
def test_curves_are_the_columns_with_the_steps_that_have_a_value(tmp_path, text, l1, psnr_db):
    (tmp_path / "metrics.csv").write_text(text)
    assert read_curves(tmp_path / "metrics.csv") == {"train/l1": l1, "val/psnr_db": psnr_db}


@pytest.mark.parametrize(
    ("text", "titles", "begins"),
    [
        (PLAIN, ["Distortion"], []),
        (GAME, ["Distortion", "Adversarial training"], [{19}, {19}]),
        ("epoch,step,train/kl\n0,9,3.0\n", ["Distortion"], []),
    ],
)
def test_the_game_is_drawn_where_there_was_one(tmp_path, text, titles, begins):
    (tmp_path / "metrics.csv").write_text(text)
    figure = plot_training(read_curves(tmp_path / "metrics.csv"), "title")
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == titles
    lines = [line for axes in figure.axes for line in axes.lines]
    assert [set(line.get_xdata()) for line in lines if line.get_linestyle() == ":"] == begins
    assert bool(lines) == ("train/l1" in text)
