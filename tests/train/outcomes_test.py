import numpy as np

from jaxref.train.outcomes import (
    plot_forecasts,
    plot_predictions,
    save_forecast_plot,
    save_prediction_plot,
)


class TestPredictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 50)
    predicted = np.where(np.isin(np.arange(50), [7, 20]), (labels + 1) % 10, labels)

    def test_mistakes_come_first_and_in_red(self):
        images = self.rng.normal(size=(50, 4, 4, 1))
        figure = plot_predictions(images, self.labels, self.predicted, most=12)
        shown = [panel for panel in figure.axes if panel.images]
        titles = [panel.get_title() for panel in shown]
        wrong = [f"{self.predicted[i]}, not {self.labels[i]}" for i in (7, 20)]
        assert titles == wrong + [str(label) for label in np.delete(self.labels, [7, 20])[:10]]
        assert [panel.title.get_color() == "tab:red" for panel in shown] == [True] * 2 + [
            False
        ] * 10
        assert figure.get_suptitle() == "2 of 50 held-out images taken for another class"
        pixels = np.asarray(shown[1].images[0].get_array())
        expected = (images[20, ..., 0] - images.min()) / np.ptp(images)
        np.testing.assert_allclose(pixels, expected, rtol=1e-6)

    def test_fewer_images_than_places_colours_and_a_constant(self):
        images = np.stack([np.full((4, 4, 3), 2.0)] * 3)
        figure = plot_predictions(images, self.labels[:3], self.labels[:3])
        shown = [panel for panel in figure.axes if panel.images]
        assert len(shown) == 3
        assert shown[0].images[0].get_array().shape == (4, 4, 3)

    def test_picture(self, tmp_path):
        images = self.rng.normal(size=(50, 4, 4, 1))
        path = save_prediction_plot(tmp_path, images, self.labels, self.predicted)
        assert path == tmp_path / "predictions.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert [file.name for file in tmp_path.iterdir()] == ["predictions.png"]


class TestForecasts:
    rng = np.random.default_rng(1)
    inputs, targets = rng.normal(size=(2, 6, 5)), rng.normal(size=(2, 3, 5))

    def test_lines_go_on_from_the_last_value(self):
        figure = plot_forecasts(self.inputs, self.targets, self.targets + 2)
        assert len(figure.axes) == 4 * 2  # of five series, four are drawn
        known, came, forecast, _ = figure.axes[2 * 1 + 1].lines  # series 1 of window 1
        np.testing.assert_array_equal(known.get_xydata()[:, 1], self.inputs[1, :, 1])
        np.testing.assert_array_equal(came.get_xdata(), [-1, 0, 1, 2])
        np.testing.assert_array_equal(
            came.get_ydata(), [self.inputs[1, -1, 1], *self.targets[1, :, 1]]
        )
        np.testing.assert_array_equal(forecast.get_ydata()[1:], self.targets[1, :, 1] + 2)
        assert figure.get_suptitle().endswith("squared error 4.000")

    def test_picture(self, tmp_path):
        path = save_forecast_plot(tmp_path, self.inputs, self.targets, self.targets)
        assert path == tmp_path / "forecasts.png"
        assert path.read_bytes().startswith(b"\x89PNG")
