import numpy as np
import pytest

from megatronish.errors import UserError
from megatronish.observe.metrics import MetricsWriter
from megatronish.observe.plot import plot_loss, points, smooth

BLUE, RED, GREEN = (31, 119, 180), (214, 39, 40), (44, 160, 44)


def picture(tmp_path, rows):
    from matplotlib.image import imread

    with MetricsWriter(tmp_path, tensorboard=False, first_step=0) as writer:
        for step, values in rows:
            writer.write(step, values)
    out = tmp_path / "plots" / "loss.png"
    plot_loss(tmp_path, out)
    assert [path.name for path in out.parent.iterdir()] == ["loss.png"]
    return (imread(out)[..., :3] * 255).round().astype(int)


def columns_of(image, colour):
    """(column, mean row) of the pixels of a colour, without the legend's: the part of the picture left of its right half's top."""
    rows, columns = np.nonzero(abs(image - np.array(colour)).max(-1) < 12)
    keep = (columns < image.shape[1] // 2) | (rows > image.shape[0] // 3)
    rows, columns = rows[keep], columns[keep]
    return {column: rows[columns == column].mean() for column in np.unique(columns)}


def run_rows(*, steps=100, evaluations=(0, 50, 100)):
    for step in range(steps + 1):
        row = {"loss": 2 + 7 * np.exp(-step / 20), "tokens_per_second": 1600.0 + step} if step else {}
        if step in evaluations:
            row["eval_loss"] = 2.2 + 7 * np.exp(-step / 20)
        yield step, row


def test_the_picture_shows_falling_losses_and_the_speed_below(tmp_path):
    image = picture(tmp_path, run_rows())
    training, held_out, speed = (columns_of(image, colour) for colour in (BLUE, RED, GREEN))
    width = image.shape[1]
    for curve in (training, held_out, speed):
        assert max(curve) - min(curve) > 0.7 * width  # from side to side
    for curve in (training, held_out):  # rows grow downwards: a falling loss
        assert curve[min(curve)] + 0.3 * image.shape[0] < curve[max(curve)]
    assert min(speed.values()) > max(training.values())  # a panel of its own
    without = picture(tmp_path / "other", run_rows(evaluations=()))
    assert not columns_of(without, RED)


def test_a_run_of_one_step_and_one_with_nan_can_be_plotted(tmp_path):
    assert picture(tmp_path / "one", [(1, {"loss": 3.0, "tokens_per_second": 10.0})]).std() > 5
    assert columns_of(picture(tmp_path / "nan", [(1, {"loss": float("nan")}), (2, {"loss": 3.0}), (3, {"loss": 2.0})]), BLUE)


def test_points_leave_out_rows_without_the_value_and_values_that_are_not_finite():
    rows = [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 8.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 7}]
    assert points(rows, "loss") == ([1, 3], [8.0, 7.0])


def test_smoothing_keeps_a_constant_starts_at_the_first_value_and_calms_noise():
    assert smooth([3.0] * 200) == pytest.approx([3.0] * 200)
    noisy = np.linspace(9, 2, 300) + np.random.default_rng(0).normal(0, 0.5, 300)
    calm = smooth(list(noisy))
    assert calm[0] == pytest.approx(noisy[0])
    assert np.diff(calm).std() < 0.25 * np.diff(noisy).std()
    assert smooth([]) == []


def test_a_folder_without_losses_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no losses"):
        plot_loss(tmp_path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
