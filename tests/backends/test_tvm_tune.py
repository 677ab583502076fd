"""What surrounds TVM's code: interrupts that must not pass through it, and what it writes on the error stream."""

from __future__ import annotations

import os
import signal

import pytest

from graphopt.backends.tvm_build import _first_line, quiet
from graphopt.backends.tvm_tune import _interrupts_kept


def test_ctrl_c_waits_for_the_end_of_a_round() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _interrupts_kept() as stop_if_asked:
        stop_if_asked()
        os.kill(os.getpid(), signal.SIGINT)
        done = list(range(3))  # the round
        assert done == [0, 1, 2]
        stop_if_asked()
        pytest.fail("it was asked to stop")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_error_stream_is_kept_unless_an_error_tells_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        os.write(2, b"[12:00:00] /a/b.cc:7: Warning: of C++\nof others\n")
    assert capfd.readouterr().err == "of others\n"
    with pytest.raises(ValueError, match="told"), quiet():
        os.write(2, b"BlockBuilder destroyed with remaining blocks!\n")
        raise ValueError("told")
    assert capfd.readouterr().err == ""


def test_conditions_of_cpp_are_not_quoted() -> None:
    quoted = RuntimeError("Traceback\nInternalError: Check failed: (a.size() == 2) is false: two sizes are needed")
    assert _first_line(quoted) == "two sizes are needed"
    assert _first_line(RuntimeError("Check failed: (f(x) > 0) is false: ")) == "a check within it failed"
    assert _first_line(RuntimeError("plain words")) == "plain words"
