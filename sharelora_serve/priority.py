"""Threads that yield the processor to those that answer requests."""

import os
import sys
import threading


def lower_priority(niceness: int) -> None:
    """Give the calling thread alone a niceness, where the system knows such a thing.

    Where processors are short, a niceness of 10 leaves a thread about a tenth of one.
    """
    if sys.platform == "linux":
        niceness = max(os.getpriority(os.PRIO_PROCESS, 0), niceness)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
