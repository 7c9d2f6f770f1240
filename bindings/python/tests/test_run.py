"""`carole.run`, and the names of the distribution carole-horovod."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import carole
from harness import catch

HOROVOD = Path(__file__).parent.parent / "horovod" / "src"


def total(start, factor=1):
    carole.init()
    mine = bytearray([start + carole.rank()])
    value = bytes(carole.allreduce(memoryview(mine), op=carole.Sum))[0]
    return carole.rank(), value * factor


def fails(rank):
    carole.init()
    if carole.rank() == rank:
        raise KeyError("this very word")
    carole.barrier()


def dies():
    carole.init()
    if carole.rank() == 1:
        os._exit(7)
    carole.barrier()


def test_results_in_rank_order():
    assert carole.run(total, (1,), {"factor": 2}, np=3) == [(0, 12), (1, 12), (2, 12)]
    assert carole.run(len, ([1, 2],)) == [2]


def test_failures():
    text = catch(carole.BrokenError, lambda: carole.run(fails, (1,), np=2))
    assert "rank 1 raised" in text and "this very word" in text
    assert "rank" in catch(carole.BrokenError, lambda: carole.run(dies, np=2))
    catch(carole.UsageError, lambda: carole.run(len, np=0))
    if importlib.util.find_spec("cloudpickle") is None:
        assert "cloudpickle" in catch(carole.UsageError, lambda: carole.run(lambda: 1))
    else:
        assert carole.run(lambda: 1, np=2) == [1, 1]


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    from carole import _run

    tmp_path.chmod(0o755)
    assert "this user" in catch(carole.UsageError, lambda: _run._work(str(tmp_path)))


def python(code, *more):
    paths = [str(path) for path in (HOROVOD, *more)] + [path for path in sys.path if path]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_name_horovod():
    code, text = python(
        "import horovod, horovod.run, horovod.common.util as util, horovod.common.elastic, horovod.common.basics\n"
        "from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt\n"
        "from horovod.common.process_sets import global_process_set\n"
        "from horovod.data.data_loader_base import AsyncDataLoaderMixin, BaseDataLoader\n"
        "from horovod.runner.launch import run_commandline\n"
        "assert callable(horovod.run) and horovod.__version__.startswith('0.28.1+carole')\n"
        "assert util.split_list([1, 2, 3], 2) == [[1, 2], [3]] and util.num_rank_is_power_2(4)\n"
        "assert horovod.run(len, ([1],), num_proc=2) == [1, 1]\n"
        "class L(AsyncDataLoaderMixin, BaseDataLoader):\n"
        "    def __len__(self): return 3\n"
        "    def _iterate(self): yield from range(3)\n"
        "    def _process_batch(self, b): return b * 2\n"
        "assert list(L()) == [0, 2, 4] == list(L(0))\n"
    )
    assert code == 0, text


def test_beside_the_real_horovod(tmp_path):
    real = tmp_path / "horovod-0.28.1.dist-info"
    real.mkdir()
    (real / "METADATA").write_text("Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n")
    code, text = python("import horovod", tmp_path)
    assert code != 0 and "both horovod 0.28.1 and carole-horovod are installed" in text


def test_horovod_torch():
    pytest.importorskip("torch", reason="torch is not installed: horovod.torch is NOT imported")
    code, text = python(
        "import horovod.torch as hvd, carole.torch\n"
        "import horovod.torch.elastic as elastic\n"
        "from horovod.torch.mpi_ops import allreduce, Average\n"
        "from horovod.torch.compression import Compression\n"
        "from horovod.torch.elastic.sampler import ElasticSampler\n"
        "assert hvd is carole.torch and elastic is hvd.elastic and ElasticSampler is elastic.ElasticSampler\n"
        "hvd.init(); assert hvd.size() == 1\n"
    )
    assert code == 0, text
