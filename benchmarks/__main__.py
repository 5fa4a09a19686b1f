"""`python -m benchmarks`. The work lies in a module of its own, which processes that measure memory can import."""

from benchmarks.suite import main

main()
