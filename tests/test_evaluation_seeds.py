"""The spread over training seeds: means by hand, a verdict that small spreads allow and large ones do not."""

import numpy as np
import pytest

from catlib.errors import InputError
from catlib.reports.sweep import gains_over_seeds, said_of_seeds
from catlib.settings import TrainSettings


def run(accuracy, gain, half=2.0, ci95=True):
    figure = {"value": accuracy, "ci95": [accuracy - 0.02, accuracy + 0.02]}
    versus = {"a": "vlm-tuned", "b": "clip-probe", "accuracy_gain_points": gain}
    versus["ci95"] = [gain - half, gain + half] if ci95 else None
    return {"models": {"vlm-tuned": {"accuracy": figure, "priority_macro_f1": None}}, "comparisons": [versus]}


def test_mean_and_spread_by_hand():
    runs = [run(0.70, 4.0), run(0.72, 5.0), run(0.74, 6.0)]
    (gain,) = gains_over_seeds(runs)
    assert (gain["n"], gain["mean"], gain["sd"]) == (3, pytest.approx(5.0), pytest.approx(1.0))
    half = np.hypot(4.302653 * np.sqrt(4 / 3), 2.0)
    assert gain["ci95"] == pytest.approx([5 - half, 5 + half], abs=1e-3)


def test_a_gain_that_seeds_scatter_is_not_called_sure():
    steady, scattered = [run(0.7, g) for g in (6.0, 6.1, 5.9)], [run(0.7, g) for g in (6.0, 1.0, 11.0)]
    assert "would gain as well" in said_of_seeds(steady)[0] and "may turn it round" in said_of_seeds(scattered)[0]
    assert "would lose as well" in said_of_seeds([run(0.7, -g) for g in (6.0, 6.1, 5.9)])[0]
    assert "no interval" in said_of_seeds([run(0.7, 6.0, ci95=False)] * 2)[0]
    with pytest.raises(InputError, match="two runs"):
        said_of_seeds(steady[:1])


def test_the_training_s_seed_is_apart_from_that_of_the_split():
    assert TrainSettings(seed=3).training_seed == 3 and TrainSettings(seed=3, train_seed=0).training_seed == 0
