"""Tests of ldm.evaluation.curves: reading metrics.csv and plotting it."""

import pytest

from ldm.evaluation.curves import COLOURS, STAGE_1_CURVES, plot_curves, read_curves

UNINTERRUPTED = "epoch,step,train/l1,val/psnr_db\n0,9,0.5,\n0,9,,20.5\n0,19,0.4,\n"
RESUMED = "epoch,step,train/l1,val/psnr_db\n0,9,0.5,\n0,19,0.4,\n0,29,0.3,\n0,14,0.48,\n0,19,0.45,20.0\n0,29,0.35,\n"


@pytest.mark.parametrize(
    ("text", "l1", "psnr_db"),
    [
        (UNINTERRUPTED, ([9, 19], [0.5, 0.4]), ([9], [20.5])),
        # the last value of a repeated step is used
        (RESUMED, ([9, 14, 19, 29], [0.5, 0.48, 0.45, 0.35]), ([19], [20.0])),
    ],
)
def test_read_curves_skips_steps_without_a_value(tmp_path, text, l1, psnr_db):
    (tmp_path / "metrics.csv").write_text(text)
    assert read_curves(tmp_path / "metrics.csv") == {"train/l1": l1, "val/psnr_db": psnr_db}


def test_plot_curves_uses_one_colour_per_group():
    curves = {"val/psnr_db": ([9], [20.5]), "train/l1": (list(range(100)), [0.5] * 100), "train/kl": ([9], [3.0])}
    figure = plot_curves(STAGE_1_CURVES, [("A", curves), ("A", curves), ("B", {"train/adaptive_weight": ([9], [1.0])})])
    figure.draw_without_rendering()
    assert [axes.get_title().split(",")[0] for axes in figure.axes] == list(STAGE_1_CURVES[:3])
    lines = [[(line.get_color(), len(line.get_xdata())) for line in axes.lines] for axes in figure.axes]
    assert lines == [[(COLOURS[0], 1)] * 2, [(COLOURS[0], 91)] * 2, [(COLOURS[1], 1)]], "means over ten values"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]
    assert plot_curves(STAGE_1_CURVES, [("A", {"train/kl": ([9], [3.0])})]) is None
