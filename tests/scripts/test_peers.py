"""The comparison with other libraries runs where none of them is installed."""

import importlib.metadata
import json

from helpers import ROOT, load_script


def test_a_step_is_measured_beside_the_ancestors_formula_alone(tmp_path, monkeypatch, capsys):
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmark"))
    out = tmp_path / "peers.json"
    load_script("benchmark/peers").main(
        ["--arch", "resnet8", "--image-size", "16", "--batch", "4", "--queue", "16",
         "--repeats", "5", "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    (row,) = json.loads(out.read_text())["rows"]
    assert row["what"] == "upstream's formula" and row["ratio"] > 0
    assert "lightly is not installed" in capsys.readouterr().out
