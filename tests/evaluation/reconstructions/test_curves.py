"""ldm.evaluation.reconstructions.curves: what is read of a metrics.csv, and what is drawn of it."""

from ldm.evaluation.reconstructions.curves import plot_training, read_curves

PLAIN = "epoch,step,train/l1,val/psnr_db\n0,9,0.5,\n0,9,,20.5\n0,19,0.4,\n"
GAME = """epoch,step,train/l1,train/adversarial,train/adaptive_weight,train/discriminator_accuracy,val/psnr_db
0,9,0.5,,,,
0,9,,,,,20.5
0,19,0.4,0.1,2.5,0.6,
0,29,0.3,0.2,1.5,0.7,
"""


def test_curves_are_the_columns_with_the_steps_that_have_a_value(tmp_path):
    (tmp_path / "metrics.csv").write_text(PLAIN)
    assert read_curves(tmp_path / "metrics.csv") == {
        "train/l1": ([9, 19], [0.5, 0.4]),
        "val/psnr_db": ([9], [20.5]),
    }


def test_of_a_step_that_was_logged_twice_the_last_value_counts(tmp_path):
    """Killed after step 29, gone on from step 9 and logged at other steps too."""
    rows = "0,9,0.5,\n0,19,0.4,\n0,29,0.3,\n0,14,0.48,\n0,19,0.45,20.0\n0,29,0.35,\n"
    (tmp_path / "metrics.csv").write_text("epoch,step,train/l1,val/psnr_db\n" + rows)
    found = read_curves(tmp_path / "metrics.csv")
    assert found == {"train/l1": ([9, 14, 19, 29], [0.5, 0.48, 0.45, 0.35]), "val/psnr_db": ([19], [20.0])}


def test_the_game_is_drawn_where_there_was_one(tmp_path):
    for text, panels in ((PLAIN, 1), (GAME, 2)):
        (tmp_path / "metrics.csv").write_text(text)
        figure = plot_training(read_curves(tmp_path / "metrics.csv"), "title")
        titled = [axes for axes in figure.axes if axes.get_title()]
        assert [axes.get_title() for axes in titled] == ["Distortion", "Adversarial training"][:panels]
        if panels == 2:
            begun = [line for axes in titled for line in axes.lines if line.get_linestyle() == ":"]
            assert [set(line.get_xdata()) for line in begun] == [{19}, {19}]
        figure.savefig(tmp_path / "training.png")


def test_a_run_without_those_columns_has_an_empty_picture(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/kl\n0,9,3.0\n")
    figure = plot_training(read_curves(tmp_path / "metrics.csv"), "title")
    figure.savefig(tmp_path / "training.png")
    assert not any(axes.lines for axes in figure.axes)
