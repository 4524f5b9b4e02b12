"""`python -m tests.distributed.program SOURCE` is `python -c SOURCE`, except that `tests.fork_server` can fork it."""

import sys

exec(compile(sys.argv[1], "<program>", "exec"), {"__name__": "__main__"})
