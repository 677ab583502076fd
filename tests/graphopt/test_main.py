"""The package runs as a module, with the exit codes of the command line."""

import subprocess
import sys


def test_the_package_runs_as_a_module() -> None:
    told = subprocess.run([sys.executable, "-m", "graphopt", "--version"], capture_output=True, text=True)
    assert told.returncode == 0 and "graphopt" in told.stdout


def test_its_exit_codes_are_those_of_the_command_line() -> None:
    told = subprocess.run([sys.executable, "-m", "graphopt", "targets", "no-such"], capture_output=True, text=True)
    assert told.returncode == 2 and "error: " in told.stderr
