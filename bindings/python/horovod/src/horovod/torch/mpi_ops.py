"""The collectives on torch tensors, and what says where a process stands in its job: what `horovod.torch` has."""

from carole.torch import *  # noqa: F403 (its __all__ is the list)
from carole.torch import __all__ as _all

from ..common.util import check_installed_version, gpu_available, num_rank_is_power_2

__all__ = [*_all, "check_installed_version", "gpu_available", "num_rank_is_power_2"]
