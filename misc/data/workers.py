"""Signal handling in the processes that load data."""

import multiprocessing
import os
import signal
import threading


def outlive_signals(worker: int) -> None:
    """Makes a loader worker ignore Ctrl-C and SIGTERM, except SIGTERM from its training process.

    The training process finishes its step before it stops, and needs its workers until then. Ctrl-C and torchrun signal
    a whole process group, which the worker leaves here. Schedulers signal every process of a job; the worker survives
    this only if it was forked. Otherwise it already has threads that may receive the signal.

    Windows has neither groups nor SIGTERM from outside, only Ctrl-C. macOS cannot tell who has sent a SIGTERM.
    """
    if not hasattr(os, "setpgrp"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_signal, daemon=True).start()


def _exit_on_parent_signal() -> None:
    parent = multiprocessing.parent_process()  # os.getppid() may be a server that forks the workers
    assert parent is not None
    training = parent.pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)
