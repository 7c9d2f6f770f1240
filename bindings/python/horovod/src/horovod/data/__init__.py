"""`horovod.data` is `carole.data`."""

from carole.data import AsyncDataLoaderMixin, BaseDataLoader

from .. import _alias

_alias(f"{__name__}.data_loader_base", "carole.data")

__all__ = ["AsyncDataLoaderMixin", "BaseDataLoader"]
