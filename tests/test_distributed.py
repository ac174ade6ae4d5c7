"""Waits after unequal work have no limit, say for whom they are, and end when a process is lost."""

from __future__ import annotations

from tests.tiny_run import launched, run


def test_a_slow_process_is_waited_for_beyond_the_limit_of_the_group_and_named() -> None:
    done = run(launched("-m", "tests.waiting_case", processes=2))
    assert done.returncode == 0, done.stderr[-3000:]
    ours = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.9 says who met whom
    assert ours == ["[0, 1] word of process 0", "lost True"], done.stdout + done.stderr
    for line in (
        "warning [process 0]: process 0 has waited 1 s for process 1 (evaluation)",
        "warning [process 0]: process 0 has waited 2 s for process 1 (a slow step)",
        "warning [process 1]: process 1 has waited 1 s for process 0 (scores)",
    ):
        assert line in done.stderr, done.stderr
