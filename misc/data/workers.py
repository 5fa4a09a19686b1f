"""Signals of the processes that load data."""

import multiprocessing
import os
import signal
import threading


def outlive_signals(worker: int) -> None:
    """A loader worker ends by its training process alone, which needs it for the step that it finishes before it stops.

    Ctrl-C and torchrun signal a whole process group, and schedulers every process of a job. Against the latter this
    helps where workers are forked; one that is started otherwise has threads already, which may take the signal.
    """
    os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    training = multiprocessing.parent_process().pid  # os.getppid() may be a server that forks the workers
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)
