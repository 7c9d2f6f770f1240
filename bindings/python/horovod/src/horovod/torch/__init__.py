"""`horovod.torch` is `carole.torch`."""

from .. import _alias
from . import mpi_ops as _mpi_ops

for _same in (
    "compression", "functions", "optimizer", "sync_batch_norm", "elastic", "elastic.state", "elastic.sampler"
):  # fmt: skip
    _alias(f"{__name__}.{_same}", f"carole.torch.{_same}")
_torch = _alias(__name__, "carole.torch")
# Carole has no module of this name, and `import horovod.torch.mpi_ops as ops` looks for the attribute.
_torch.mpi_ops = _mpi_ops
