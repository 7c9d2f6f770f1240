"""Exceptions."""

from carole._errors import HorovodInternalError, HorovodVersionMismatchError, HostsUpdatedInterrupt

__all__ = [
    "HorovodInternalError",
    "HorovodVersionMismatchError",
    "HostsUpdatedInterrupt",
    "get_version_mismatch_message",
]


def get_version_mismatch_message(name, version, installed_version):
    """What HorovodVersionMismatchError says."""
    return str(HorovodVersionMismatchError(name, version, installed_version))
