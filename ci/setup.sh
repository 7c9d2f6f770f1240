# Sourced by ci/test and ci/demo from the root of the repository: what a fresh machine may lack.
# shellcheck shell=bash

venv_options=()

say() { printf '%s\n' "$*" >&2; }

# Installs a package of Debian or Ubuntu, as root or through sudo.
install_package() {
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    command -v apt-get >/dev/null || { say "$* is missing, and there is no apt-get here; please install it"; return 1; }
    say "installing $*"
    "${as_root[@]}" apt-get update -qq && "${as_root[@]}" apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

need_compiler() {
    command -v cc >/dev/null && command -v c++ >/dev/null || install_package build-essential
    command -v cargo >/dev/null || { say "cargo is missing; see https://rustup.rs"; return 1; }
}

# For the launcher's tests over ssh between namespaces, which take root and say so where they cannot run.
want_sshd() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        [ -x /usr/sbin/sshd ] && command -v nft >/dev/null && command -v ip >/dev/null ||
            install_package openssh-server openssh-client nftables iproute2 || say "no sshd: its tests are skipped"
    fi
}

# For ranks under Slurm, whose daemons take root and are started by the test itself.
want_slurm() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        [ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/slurmd ] && [ -x /usr/sbin/munged ] && command -v srun >/dev/null ||
            install_package slurm-wlm munge || say "no Slurm: its tests are skipped"
    fi
}

# For MPI as a transport: two implementations, and what their crate is built with.
want_mpi() {
    if command -v apt-get >/dev/null; then
        command -v mpicc.openmpi >/dev/null && command -v mpicc.mpich >/dev/null && command -v clang >/dev/null ||
            install_package openmpi-bin libopenmpi-dev mpich libmpich-dev clang libclang-dev ||
            say "no MPI: its tests are skipped"
    fi
}

# Sets PYTHON to one that is new enough.
need_python() {
    local name
    for name in python3.11 python3 python3.12 python3.13 python3.10; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
            PYTHON=$name
            return 0
        fi
    done
    install_package python3 python3-venv python3-pip
    PYTHON=python3
}

# Sets PYTHON to one that has torch, or adds torch to `packages`, and options of venv to `venv_options`. Debian's
# torch is much smaller than PyPI's, which brings CUDA; it is older than NumPy 2.
need_torch() {
    if command -v apt-get >/dev/null; then
        local small=/usr/bin/python3
        "$small" -c 'import torch, venv, ensurepip' 2>/dev/null || install_package python3-torch python3-venv
        if "$small" -c 'import torch, venv, ensurepip' 2>/dev/null; then
            PYTHON=$small
            venv_options=(--system-site-packages)
            packages+=("numpy<2")
            return 0
        fi
        say "python3-torch cannot be installed here; taking PyPI's torch, which is large"
    fi
    need_python
    packages+=(torch)
}

# Makes FOLDER with the newest torch of the package index, several gigabytes; the trainers beside it where the first
# argument says so. Where that cannot be done, FOLDER.reason says why, and the steps that need it count as skipped.
#   need_newest_torch FOLDER [--with-trainers]
need_newest_torch() {
    local folder=$1 python=$1/bin/python reason=$1.reason trainers=(lightning accelerate deepspeed) free_kb
    mkdir -p "$(dirname "$folder")"
    rm -f "$reason" "$folder-trainers.reason"
    if ! [ -e "$folder/.packages" ]; then
        free_kb=$(df -Pk "$(dirname "$folder")" | awk 'NR == 2 { print $4 }')
        if [ "$free_kb" -lt $((12 * 1024 * 1024)) ]; then
            echo "the newest torch takes up to 12 GB while it is installed, and $((free_kb >> 20)) GB are free" >"$reason"
            cp "$reason" "$folder-trainers.reason"
            return 0
        fi
    fi
    if ! make_venv "$folder" pytest cloudpickle numpy torch; then
        echo "pip could not install the newest torch (no network?)" >"$reason"
        cp "$reason" "$folder-trainers.reason"
        rm -f "$folder/.packages"
        return 0
    fi
    [ "${2:-}" = --with-trainers ] || return 0
    # DeepSpeed comes as a source that looks for torch while it is built.
    if "$python" -c 'import lightning, accelerate, importlib.util as u; assert u.find_spec("deepspeed")' 2>/dev/null; then
        return 0
    fi
    say "adding ${trainers[*]} to $folder"
    "$python" -m pip install --quiet --disable-pip-version-check setuptools wheel ninja &&
        "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation "${trainers[@]}" ||
        echo "pip could not install ${trainers[*]}" >"$folder-trainers.reason"
}

# make_venv FOLDER PACKAGE...: a virtual environment with these packages; done once for each list of them.
make_venv() {
    local folder=$1
    shift
    local stamp="$folder/.packages"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$*" ]; then
        return 0
    fi
    say "setting up $folder: $*"
    "$PYTHON" -m venv "${venv_options[@]}" "$folder" &&
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip "$@" || return 1
    printf '%s' "$*" >"$stamp"
}
