"""Small helpers that programs import."""

import contextlib
import functools
import importlib.util
import os

EXTENSIONS = ["tensorflow", "torch", "mxnet"]

# Programs decorate functions of their own with it.
_cache = functools.lru_cache(maxsize=None)


def extension_available(ext_base_name, verbose=False):
    """Whether a framework can be used: torch, where it is installed."""
    del verbose
    return ext_base_name == "torch" and importlib.util.find_spec("torch") is not None


def check_extension(ext_name, ext_env_var=None, pkg_path=None, *args):
    """Raises ImportError where a framework cannot be used."""
    del ext_env_var, pkg_path, args
    name = ext_name.rpartition(".")[2]
    if not extension_available(name):
        raise ImportError(f"{ext_name} is not there: Carole provides horovod.torch, where torch is installed")


def check_installed_version(name, version, exception=None):
    """Nothing to check: one wheel serves all versions of a framework."""
    del name, version, exception


def gpu_available(ext_base_name, verbose=False):
    """Whether a framework sees a GPU."""
    del verbose
    if not extension_available(ext_base_name):
        return False
    import torch

    return torch.cuda.is_available()


def mpi_built(verbose=False):
    """No."""
    del verbose
    return False


def gloo_built(verbose=False):
    """Links that need no MPI are built in; they are Carole's own."""
    del verbose
    return True


nccl_built = ddl_built = ccl_built = mpi_built


@contextlib.contextmanager
def env(**kwargs):
    """Sets variables of the environment for a while; None removes one."""
    before = {name: os.environ.get(name) for name in kwargs}

    def put(values):
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(kwargs)
    try:
        yield
    finally:
        put(before)


def is_iterable(x):
    """Whether something can be iterated over."""
    try:
        iter(x)
    except TypeError:
        return False
    return True


def num_rank_is_power_2(num_rank):
    """Whether a number is a power of two."""
    return num_rank != 0 and num_rank & (num_rank - 1) == 0


def split_list(l, n):  # noqa: E741 (Horovod's name)
    """A list in `n` parts of almost equal length."""
    size, more = divmod(len(l), n)
    return [l[i * size + min(i, more) : (i + 1) * size + min(i + 1, more)] for i in range(n)]


def is_version_greater_equal_than(ver, target):
    """Compares versions of the form 1.2.3."""

    def numbers(text):
        return [int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit()]

    return numbers(ver) >= numbers(target)
