"""Starting jobs from Python."""

import carole

__all__ = ["run"]


def run(
    func, args=(), kwargs=None, num_proc=1, min_num_proc=None, max_num_proc=None, slots=None, reset_limit=None,
    cooldown_range=None, hosts=None, hostfile=None, host_discovery_script=None, start_timeout=None, ssh_port=None,
    ssh_identity_file=None, disable_cache=None, output_filename=None, verbose=None, use_gloo=None, use_mpi=None,
    mpi_args=None, network_interface=None, network_interfaces=None, executable=None, np=None, min_np=None, max_np=None,
):  # fmt: skip
    """Calls `func(*args, **kwargs)` on `num_proc` ranks of this host and returns their results, in rank order.

    `np` is an older name of `num_proc`. Other hosts and elastic jobs are refused here; horovodrun starts the former.
    What only Horovod's own controllers need is accepted and without effect.
    """
    del slots, reset_limit, cooldown_range, ssh_port, ssh_identity_file, disable_cache, use_gloo, network_interface
    del network_interfaces
    for name, value in (("use_mpi", use_mpi), ("mpi_args", mpi_args), ("executable", executable),
                        ("host_discovery_script", host_discovery_script), ("hostfile", hostfile),
                        ("min_num_proc", min_num_proc or min_np), ("max_num_proc", max_num_proc or max_np)):  # fmt: skip
        if value:
            raise carole.UsageError(f"horovod.run({name}={value!r}) is not supported; horovodrun starts jobs")
    names = [part.partition(":")[0] for part in hosts.split(",")] if hosts else []
    if any(name not in ("localhost", "127.0.0.1") for name in names):
        raise carole.UsageError(f"horovod.run(hosts={hosts!r}) works on this host only; use horovodrun -H {hosts}")
    launcher = []
    for flag, value in (("--start-timeout", start_timeout), ("--output-filename", output_filename)):
        launcher += [flag, str(value)] if value is not None else []
    launcher += ["--verbose"] if verbose else []
    return carole.run(func, args, kwargs, np=np if np is not None else num_proc, launcher=launcher)
