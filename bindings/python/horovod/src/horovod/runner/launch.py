"""The command `horovodrun`."""

from carole._scripts import horovodrun as run_commandline

__all__ = ["run_commandline"]

if __name__ == "__main__":
    run_commandline()
