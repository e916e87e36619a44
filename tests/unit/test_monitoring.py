"""The Grafana dashboard shows figures that a stage reports."""

import json
import re
from pathlib import Path

from geodistill.evaluate.plots import CURVES

DASHBOARD = Path(__file__).parents[2] / "infra/monitoring/grafana-dashboard.json"


def test_every_panel_shows_a_figure_of_a_stage():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [re.match(r"ray_geodistill_(\w+)\{stage", target["expr"]) for panel in panels for target in panel["targets"]]
    assert all(shown) and {found[1] for found in shown} <= CURVES.keys()
    assert {"tokens_per_second", "images_per_second", "reverse_kl", "agreement", "data_wait", "peak_memory_gib"} <= {
        found[1] for found in shown
    }
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels) == len({panel["id"] for panel in panels})
