import numpy as np

from jaxref.bench import losses_digits
from jaxref.bench.harness import Measurement


def test_settings_damage_what_they_say():
    wrong, rare, positives = losses_digits.settings(3)
    clean = rare.labels[0]
    assert np.all(np.abs((wrong.labels != clean).mean(axis=1) - 0.4) < 0.05)
    assert wrong.trained_on.all()
    for labels, mask in zip(rare.labels, rare.trained_on):
        counts = np.bincount(labels[mask], minlength=10)
        np.testing.assert_array_equal(counts[:5], 8)
        np.testing.assert_array_equal(counts[5:], np.bincount(clean)[5:])
    np.testing.assert_array_equal(np.sum(positives.labels * positives.trained_on, axis=1), 32)
    assert len({mask.tobytes() for mask in positives.trained_on}) == 3


def test_plot_has_a_panel_for_each_setting_and_metric():
    measured = [
        Measurement("losses_digits", case, loss, kind, value)
        for case, metrics in (("wrong labels", ["accuracy"]), ("rare positives", ["AUROC", "F1"]))
        for metric in metrics
        for loss, mean in (("cross_entropy", 0.8), ("other", 0.9))
        for kind, value in ((metric, mean), (f"{metric} standard error", 0.01))
    ]
    axes = losses_digits.plot_study(measured)
    assert [ax.get_xlabel() for ax in axes] == ["accuracy", "AUROC", "F1"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["cross_entropy", "other"]
