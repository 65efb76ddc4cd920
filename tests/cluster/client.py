"""A client that goes on asking, whatever happens: it prints each request that failed, and why.

python -m tests.cluster.client URL    # until it is terminated
"""

from __future__ import annotations

import sys
import threading
import time

from common.ask import ask
from common.response import Malformed

STREAMS, PAUSE, PATIENCE = 4, 0.1, 60.0  # seconds
BODY = {"model": "org/model", "prompt": "x", "max_tokens": 8, "ignore_eos": True}


def main() -> None:
    for _ in range(STREAMS):
        threading.Thread(target=keep_asking, args=(sys.argv[1],)).start()


def keep_asking(url: str) -> None:
    while True:
        if said := failure(url):
            print(f"{time.time():.2f} {said}", flush=True)
        time.sleep(PAUSE)


def failure(url: str) -> str:
    try:
        status = ask(f"{url}/v1/completions", PATIENCE, body=BODY).status
    except (OSError, Malformed) as error:
        return f"{type(error).__name__}: {error}"
    return "" if status == 200 else f"status {status}"


if __name__ == "__main__":
    main()
