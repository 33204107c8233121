import re

import numpy as np
import pytest

from demos.facts import training_facts
from easyanimate_jax.evaluation import web


def test_a_page_needs_no_other_file():
    clip = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), np.uint8)
    chart = web.line_chart(
        {"loss": ([0.0, 1.0, 2.0], [1.0, 0.5, 0.25])},
        x_label="step",
        bands=[(0.0, 1.0, "a"), (1.0, 2.0, "b")],
    )
    page = web.page(
        "a <title>",
        [
            ("Chart", chart),
            ("Clip", web.video(clip, "红色")),
            ("Frame", web.picture(clip[0])),
        ],
    )
    assert "a &lt;title&gt;" in page and "红色" in page
    assert page.count("data:video/mp4;base64,") == page.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_line_goes_through_its_points():
    svg = web.line_chart({"y": ([0.0, 10.0], [0.0, 1.0])}, x_label="x", width=110, height=100)
    (points,) = re.findall(r'points="([^"]*)"', svg)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    assert x0 < x1 and y0 > y1  # svg counts y from the top


def test_smoothing_is_a_running_mean():
    np.testing.assert_allclose(web.smooth([2.0, 4.0, 6.0, 8.0], 2), [2, 3, 5, 7])


def test_facts_are_counted_from_the_metrics(tmp_path):
    from dataclasses import replace

    from configs.demo import config

    (tmp_path / "summary.json").write_text('{"compiled_train_programs": 2, "seconds": 9.0}')
    config = replace(config, run=str(tmp_path), vae=str(tmp_path), stages=config.stages[:2])
    rows = [
        {
            "stage": stage.name,
            "task": stage.task,
            "bucket": 48,
            "loss": loss,
            "seconds": 1.0,
            "real_tokens": 45,
            "tokens": 48,
        }
        for stage, losses in zip(config.stages, ([3, 2, 1], [4, 2]), strict=True)
        for loss in losses
    ]
    facts = training_facts(config, rows)
    assert facts["token_efficiency"] == pytest.approx(45 / 48)
    assert facts["bucket_task_pairs"] == 1 and facts["compiled_train_programs"] == 2
    assert facts["stages"]["image"] == {"steps": 3, "loss_start": 3, "loss_end": 1, "seconds": 3}
