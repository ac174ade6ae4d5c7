"""Run by tests/test_distributed.py in two processes: one is slower than the group's limit, then one is lost.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.waiting_case
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

from utils import distributed
from utils.errors import leave, lost_process
from utils.log import setup_logging

LIMIT, SLOW = 4, 6.0
"""Seconds: the group's limit (the two processes must also find each other within it), work of the slow process."""


def main() -> None:
    distributed.TIMEOUT, distributed.NOTICE = timedelta(seconds=LIMIT), 1.0
    distributed.start(threads=1)
    setup_logging()
    mine = distributed.rank()
    time.sleep(SLOW * mine)
    distributed.barrier("evaluation")
    time.sleep(SLOW * mine)
    gathered = distributed.gather(mine, "a slow step")
    time.sleep(SLOW * (1 - mine))
    told = distributed.from_main("word of process 0" if mine == 0 else None, "scores")
    if mine == 1:
        os._exit(0)
    print(gathered, told)
    start = time.monotonic()
    try:
        distributed.barrier("mining")
    except RuntimeError as error:
        print("lost" if lost_process(error) else f"unnamed: {error}", time.monotonic() - start < SLOW)
    leave(0)


if __name__ == "__main__":
    main()
