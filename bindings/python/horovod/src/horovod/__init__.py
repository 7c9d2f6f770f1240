"""The name `horovod`, provided by Carole (https://horovod.ai is another project)."""

import importlib
import importlib.metadata
import sys
import types

import carole

__version__ = f"0.28.1+carole.{carole.__version__}"


def _refuse_beside_horovod():
    try:
        real = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"both horovod {real} and carole-horovod are installed, and both are called horovod. Keep one: "
        "`pip uninstall horovod carole-horovod`, then install the one you want again"
    )


def _alias(name, target):
    """`import NAME` gives the module `target`."""
    module = importlib.import_module(target)
    sys.modules[name] = module
    return module


class _Run(types.ModuleType):
    """`horovod.run` is a function, and was a module once: this is both."""

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)


_refuse_beside_horovod()

from .runner import run as _run  # noqa: E402

run = _Run("horovod.run", _run.__doc__)
run.run = _run
sys.modules["horovod.run"] = run
del _Run
