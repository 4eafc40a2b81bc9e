"""The benchmark runs, and checks that what it compares are the same updates. Its figures are for people."""
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_runs():
    program = Path(__file__).parent / "benchmarks" / "run.py"
    run = subprocess.run([sys.executable, "-W", "error", program, "--rounds", "1", "--steps", "20"],
                         capture_output=True, text=True, check=True)
    assert [line.split("  ")[0] for line in run.stdout.splitlines()[2:]] == [
        "by hand: AdamW + OneCycleLR", "by hand: fused, float schedule", "Learner, default", "Learner, silent"]
    assert run.stderr == ""


@pytest.mark.slow
def test_the_benchmark_of_checkpoints_runs():
    program = Path(__file__).parent / "benchmarks" / "checkpoint.py"
    run = subprocess.run([sys.executable, "-W", "error", program, "--rounds", "1", "--saves", "1"],
                         capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["small", "2 M", "25 M"]
    assert "with a Checkpoint that is not due" in lines[5]
    assert run.stderr == ""


@pytest.mark.slow
def test_the_benchmark_of_graphs_has_nothing_to_measure_on_a_cpu():
    program = Path(__file__).parent / "benchmarks" / "graph.py"
    run = subprocess.run([sys.executable, "-W", "error", program, "--device", "cpu"], capture_output=True, text=True,
                         check=True)
    assert run.stdout.startswith("cpu: there is nothing to measure without a CUDA device")


def test_the_benchmark_of_loading_runs():
    program = Path(__file__).parent / "benchmarks" / "loading.py"
    run = subprocess.run([sys.executable, "-W", "error", "-W", "ignore:.*fork:DeprecationWarning", program,
                          "--rounds", "1", "--batches", "20"], capture_output=True, text=True, check=True)
    assert [line.split("  ")[0] for line in run.stdout.splitlines()[2:]] == [
        "list of batches", "TensorLoader", "DataLoader, 0 workers", "DataLoader, 2 workers"]


def test_the_benchmark_of_data_in_memory_runs():
    program = Path(__file__).parent / "benchmarks" / "in_memory.py"
    run = subprocess.run([sys.executable, "-W", "error", program, "--rounds", "1", "--samples", "1000"],
                         capture_output=True, text=True, check=True)
    names = [line.split("  ")[0] for line in run.stdout.splitlines()]
    assert [name for name in names if name.startswith("TensorLoader")] == [
        f"TensorLoader, {dtype}, batch {size}" for dtype in ("float32", "uint8") for size in (64, 256)]
    assert names[-1] == "epoch: Learner, TensorLoader"
    assert run.stderr == ""
