"""llama.cpp's own HTTP server, as the package xllamacpp has it: `llamacpp.py MODEL.gguf PORT`."""

from __future__ import annotations

import sys
import threading


def main(model: str, port: str) -> None:
    import xllamacpp  # type: ignore[import-not-found]

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_parallel, params.n_ctx = 4, 16384
    params.cpuparams.n_threads = 1  # several spin for each other on a machine with other work
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
