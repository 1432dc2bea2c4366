"""The benchmarks of the README, in tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_benchmark_of_the_readme_runs():
    """Two jobs: a table of at most 100 columns, then a line of JSON. If the sides disagree, it exits with 1."""
    pytest.importorskip("transformers")
    bench = Path(__file__).with_name("bench.py")
    command = [sys.executable, str(bench), "--small", "--rounds=1", "--threads=1", "--jobs=cp-bf16,piqa"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert max(map(len, table)) <= 100 and sum("plain" in line for line in table) == 2
    result = json.loads(last)
    assert result["small"] and result["rounds"] == result["threads"] == 1 and result["versions"]["torch"]
    assert result["jobs"].keys() == {"cp-bf16", "piqa-fp32"}
    for row in result["jobs"].values():
        assert row["agree"] and row["gflop_per_second"] > 0
        for side in row.keys() & {"here", "plain", "kept"}:
            m = row[side]
            assert m["seconds"] > 0 and m["per_second"] > 0
            assert 0 < m["share"] < 2  # above 1 where other jobs were in the way of the large product
            assert m["peak_mb"] is None or m["peak_mb"] > 50
        assert len(row["plain"]["ratios"]) == 1 and row["plain"]["ratio"] > 0
    assert "kept" in result["jobs"]["cp-bf16"]


def test_the_script_for_a_gpu_runs_without_one(tmp_path):
    """All sections, checks of scores, gradients and tokens included; what does not hold would end it with 1."""
    pytest.importorskip("transformers")
    script, out = Path(__file__).with_name("gpu.py"), tmp_path / "gpu.json"
    command = [sys.executable, str(script), "--device=cpu", "--small", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert max(map(len, done.stdout.splitlines())) <= 100 and "nothing failed or differs" in done.stdout
    result = json.loads(out.read_text())
    assert len(result["sections"]) == 9 and result["bad"] == 0
    assert any(row.get("verdict") == "ok" for row in result["sections"]["scores"]["results"].values())
