"""`fuse bench kernels` writes one complete row per kernel."""

import argparse
import json

from fuse.benchmarks import kernels


def test_writes_a_row_per_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "BENCHMARKS", (lambda repeats: kernels.gae_row(repeats, num_samples=3, max_tokens=5),))
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    path = tmp_path / "out.json"
    assert kernels.run(parser.parse_args(["--repeats", "2", "--json", str(path)])) == 0
    results = json.loads(path.read_text())
    (row,) = results["rows"]
    assert row["kernel"] == "gae"
    assert row["pass"] == "forward"
    assert row["shape"] == [3, 5]
    assert row["dtype"] == "float32"
    assert row["implementation"].startswith("native")
    assert row["ms"] > 0
    assert row["reference_ms"] > 0
    assert {"peak_bytes", "reference_peak_bytes"} <= row.keys()
    assert results["machine"]["num_cores"] >= 1
    assert "gae" in capsys.readouterr().out
