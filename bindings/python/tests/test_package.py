"""What is installed, as a whole."""

import importlib.metadata
import zlib

import pytest


def test_the_wheel_is_small():
    """Under 5 MB, with whatever profile it was built; a wheel deflates its files one by one."""
    try:
        files = importlib.metadata.files("carole") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("carole is not installed: its wheel's size is NOT looked at")
    # What installing adds is not in the wheel.
    files = [file for file in files if not file.match("*.pyc") and ".." not in file.parts]
    sizes = {str(file): len(zlib.compress(file.read_binary())) for file in files}
    assert any("_native" in name for name in sizes), sizes
    assert sum(sizes.values()) < 5_000_000, sorted(sizes.items(), key=lambda item: -item[1])[:3]
