import jax
import numpy as np
import pytest

from jaxref.train.config import ConfigError, load_config
from jaxref.train.loop import build_program, load, train
from jaxref.train.records import read_metrics
from jaxref.train.series import load_series


@pytest.fixture
def counting(tmp_path):
    """A file of two series, t and 100 - 2 t, and what it holds."""
    t = np.arange(50)
    values = np.stack([t, 100 - 2 * t], axis=1)
    path = tmp_path / "counting.csv"
    path.write_text("up,down\n" + "\n".join(f"{a},{b}" for a, b in values) + "\n")
    return f"series:{path}", values


SIZES = {"context_length": 6, "horizon": 3, "validation_fraction": 0.2, "period": 4}


class TestData:
    def test_file_is_standardised_by_what_is_trained_on(self, counting):
        name, values = counting
        data = load_series(name, **SIZES)
        expected = (values - values[:40].mean(axis=0)) / values[:40].std(axis=0)
        np.testing.assert_allclose(data.values, expected, rtol=1e-6)
        assert data.summary() == (
            f"{data.description}; 2 series of 40 steps to train on, 10 held out; 3 steps from 6"
        )

    def test_no_training_window_reaches_what_is_held_out(self, counting):
        data = load_series(counting[0], **SIZES)
        config = load_config(overrides=["batch_size=32"])
        assert data.sizes(config) == {
            "context_length": 6,
            "horizon": 3,
            "channels": 2,
            "num_examples": 32,
        }
        batch = next(iter(data.batches(config)))
        assert sorted(batch["ids"]) == list(range(32))
        windows = np.concatenate([batch["inputs"], batch["targets"]], axis=1)
        np.testing.assert_array_equal(windows, data.values[batch["ids"][:, None] + np.arange(9)])
        assert windows[..., 0].max() == data.values[39, 0]

    def test_held_out_windows_are_all_there_once(self, counting):
        data = load_series(counting[0], **SIZES)
        config = load_config(overrides=["batch_size=3"])
        batches, baselines = data.held_out(config)
        where = np.concatenate([batch["where"] for batch in batches])
        targets = np.concatenate([batch["targets"] for batch in batches])[where]
        np.testing.assert_array_equal(targets, data.values[np.arange(40, 48)[:, None] + range(3)])
        slopes = np.diff(data.values[:2], axis=0)[0]
        # the last value is 1, 2, 3 steps back, and the last season 4 each time
        expected = {
            "last value": np.mean(slopes**2) * 14 / 3,
            "last season": 16 * np.mean(slopes**2),
        }
        assert baselines == pytest.approx(expected, rel=1e-4)
        # a season of two, taken twice, is 2, 2 and 4 steps back
        _, baselines = load_series(counting[0], **SIZES | {"period": 2}).held_out(config)
        assert baselines["last season"] == pytest.approx(8 * np.mean(slopes**2), rel=1e-4)

    def test_made_series_have_their_seasons(self):
        values = load_series("seasons", period=24).values
        np.testing.assert_array_equal(values, load_series("seasons").values)
        values = values[: 23 * 168]
        line = np.polynomial.polynomial.polyvander(np.linspace(-1, 1, len(values)), 1)
        values = values - line @ np.linalg.lstsq(line, values, rcond=None)[0]
        spectrum = np.abs(np.fft.rfft(values, axis=0))
        cycles = np.argsort(spectrum[1:], axis=0)[::-1][:2] + 1
        for channel in range(3):
            assert sorted(cycles[:, channel]) == [23, 7 * 23]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a,b\n1,2\n3\n", "must hold numbers|as many in every line"),
            ("1,2\n3,x\n", "must hold numbers with commas"),
            ("1,2\n3,nan\n", "must hold finite numbers"),
            ("1,2\n" * 9, "must have at least context_length"),
        ],
    )
    def test_files_that_do_not_do(self, tmp_path, text, message):
        path = tmp_path / "series.csv"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_series(f"series:{path}", **SIZES)

    def test_names_and_numbers_that_do_not_do(self):
        with pytest.raises(ValueError, match="must be 'seasons' or 'series:FILE', got 'series'"):
            load_series("series")
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_series("series:/nowhere.csv")
        with pytest.raises(ValueError, match=r"horizon must be in \[1, inf\), got 0"):
            load_series("seasons", horizon=0)


def test_a_forecaster_beats_what_repeats(tmp_path, capsys):
    """In 40 steps, in the main program, which leaves its pictures."""
    overrides = [
        "model.stacks=('trend','generic')",
        "model.num_layers=2",
        "model.features=16",
        "steps=40",
        "validate_every=40",
        "data.context_length=36",
        "data.horizon=12",
        "schedule.peak_value=2e-2",
    ]
    config = load_config("configs/forecast.py", overrides)
    train(config, tmp_path / "run")
    loss = read_metrics(tmp_path / "run")[-1]["validation_loss"]
    _, baselines = load(config).held_out(config)
    assert loss < 0.8 * min(baselines.values())
    assert f"{loss:.3f} squared error (last value " in capsys.readouterr().out
    for picture in ("loss.png", "forecasts.png"):
        assert (tmp_path / "run" / picture).exists()


def test_several_series_together_and_a_loss_by_step():
    overrides = ["model.name=CARD", "loss.name=signal_decay_loss"]
    config = load_config("configs/forecast.py", overrides)
    program = build_program(config, load(config))
    state, metrics = jax.eval_shape(program.step, program.abstract_state, program.abstract_batch)
    assert metrics.loss.shape == ()
    assert jax.tree.structure(state) == jax.tree.structure(program.abstract_state)


def test_losses_and_models_that_do_not_go_with_series():
    config = load_config("configs/forecast.py", ["loss.name=softmax_cross_entropy"])
    with pytest.raises(ConfigError, match="is not of predictions of numbers, and data"):
        build_program(config, load(config))
    config = load_config("configs/digits.py", ["loss.name=huber_loss"])
    with pytest.raises(ConfigError, match="is of predictions of numbers, and data"):
        build_program(config, load(config))
    config = load_config("configs/forecast.py", ["model.name=ResNet", "model.depth=18"])
    with pytest.raises(ConfigError, match="is not a model of series"):
        build_program(config, load(config))
    config = load_config("configs/digits.py", ["data.as_series=True"])
    with pytest.raises(ConfigError, match="is not a model of series with labels"):
        build_program(config, load(config))


def test_images_row_by_row(capsys, tmp_path):
    """Digits as eight steps of eight channels, by the transformer for series that have labels."""
    overrides = [
        "data.as_series=True",
        "model.name=TimeSeriesTransformer",
        "model.num_heads=4",
        "steps=60",
        "validate_every=60",
        "schedule.peak_value=1e-2",
    ]
    config = load_config("configs/digits.py", overrides)
    data = load(config)
    assert data.sizes(config) == {"series_shape": (8, 8), "num_classes": 10, "num_examples": 1438}
    batch = next(iter(data.batches(config)))
    np.testing.assert_array_equal(batch["inputs"][..., None], data.train_images[batch["ids"]])
    train(config, tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["validation_accuracy"] > 0.8
    assert "359 held out, read row by row" in capsys.readouterr().out
    assert (tmp_path / "run" / "predictions.png").exists()
