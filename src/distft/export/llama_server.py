"""Serve a GGUF file with xllamacpp's llama.cpp: `python -m distft.export.llama_server FILE CONTEXT THREADS`.

Prints the address once the model is loaded, and ends when its standard input does.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    import xllamacpp

    settings: Any = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx = int(sys.argv[2])
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(sys.argv[3])
    settings.n_parallel, settings.port, settings.warmup, settings.verbosity = 1, 0, False, -1
    settings.use_jinja = True
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads would be waited for


if __name__ == "__main__":
    main()
