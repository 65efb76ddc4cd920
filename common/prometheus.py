"""Parses a Prometheus /metrics page of an engine or HAProxy into names, labels and values."""

import math
import re
from collections.abc import Iterator

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{.*\})?[ \t]+([^\s#]+)", re.M)

# The engines' names for each metric, without the engine's prefix.
RUNNING = ("num_requests_running", "num_running_reqs", "batch_current_size")
WAITING = ("num_requests_waiting", "num_queue_reqs", "queue_size")
MADE = ("generation_tokens",)  # tokens

Page = dict[str, list[float]]  # a metric's values, one per set of labels (replica, model, reason)


def samples(text: str) -> Iterator[tuple[str, str, float]]:
    """Every sample with a finite value: its name, its labels in braces, the value."""
    for name, labels, text_of_value in SAMPLE.findall(text):
        try:
            value = float(text_of_value)
        except ValueError:
            continue
        if math.isfinite(value):
            yield name, labels, value


def of_engine(engines: str, *texts: str) -> Page:
    """The metrics of any of `engines` (`a|b`), without the engine's prefix and a final `_total`."""
    of_one, found = re.compile(rf"(?:ray_)?(?:{engines})[:_](\w+)"), Page()
    for name, _, value in (each for text in texts for each in samples(text)):
        if known := of_one.fullmatch(name):
            found.setdefault(known[1].removesuffix("_total"), []).append(value)
    return found


def total(page: Page, names: tuple[str, ...]) -> float | None:
    """The sum over all labels of the first name that is present; None if none is."""
    return next((sum(page[name]) for name in names if name in page), None)
