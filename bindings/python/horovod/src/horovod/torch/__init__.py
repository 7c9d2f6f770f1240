"""`horovod.torch` is `carole.torch`."""

import sys

from .. import _alias

for _theirs, _ours in (
    ("mpi_ops", "ops"), ("compression", "compression"), ("functions", "functions"), ("optimizer", "optimizer"),
    ("sync_batch_norm", "sync_batch_norm"), ("elastic", "elastic"), ("elastic.state", "elastic.state"),
    ("elastic.sampler", "elastic.sampler"),
):  # fmt: skip
    _alias(f"{__name__}.{_theirs}", f"carole.torch.{_ours}")
sys.modules[__name__] = _alias(__name__, "carole.torch")
