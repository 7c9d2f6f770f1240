"""The examples for torch, made small, on two ranks. SKIPPED AS A WHOLE where torch is not installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import free_port

torch = pytest.importorskip("torch", reason="torch is not installed: its examples are NOT run")

EXAMPLES = Path(__file__).parent.parent / "examples"
LAUNCH = "from carole._scripts import carolerun; carolerun()"


def start(example, *arguments, ranks=2, flags=(), path=None):
    program = [sys.executable, str(EXAMPLES / example), *arguments]
    command = [sys.executable, "-c", LAUNCH, "-np", str(ranks), *flags, *program]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("CAROLE_", "HOROVOD_"))}
    if path is not None:
        variables["PYTHONPATH"] = os.pathsep.join([str(path), variables.get("PYTHONPATH", "")])
    variables["MASTER_PORT"] = str(free_port())
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_resnet():
    text = start(
        "resnet_synthetic.py", "--model", "resnet18", "--batch-size", "2", "--image-size", "32", "--num-iters", "2",
        "--num-batches-per-iter", "1", "--num-warmup-batches", "1", "--groups", "3",
    )  # fmt: skip
    assert "Total img/sec on 2 CPU(s)" in text and "Iter #1" in text


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_gpt(wrap):
    if wrap == "fsdp2" and torch.__version__.startswith("1."):
        pytest.skip(f"torch {torch.__version__} has no FSDP2")
    assert "agrees" in start("gpt.py", "--wrap", wrap, "--steps", "6", "--batch", "4")


@pytest.mark.parametrize("example", ["digits_torch.py", "digits_numpy.py"])
def test_digits(example, tmp_path):
    # As where scikit-learn is missing.
    (tmp_path / "sklearn.py").write_text("raise ImportError")
    text = start(example, path=tmp_path)
    assert "generated digits" in text and "agrees" in text, text
    accuracy = re.search(r" 14 +[0-9.]+ +([0-9.]+) ", text)
    assert accuracy and float(accuracy[1]) > 0.9, text


def test_accumulation():
    assert "agrees" in start("accumulation_torch.py")


def test_uneven():
    assert "same weights on all ranks: yes" in start("uneven_torch.py", ranks=3)


def test_elastic():
    text = start("elastic_torch.py", "--epochs", "1", flags=("--min-np", "1", "--max-np", "2"))
    assert text.count("begins with epoch 0") == 2 == text.count("rank 0 of 2: done") + text.count("rank 1 of 2: done")
