"""A page of /metrics as Prometheus reads it, of an engine or of HAProxy: names, labels, values."""

import math
import re
from collections.abc import Iterator

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{.*\})?[ \t]+([^\s#]+)", re.M)

# What engines call a thing, without their own name before it.
RUNNING = ("num_requests_running", "num_running_reqs", "batch_current_size")
WAITING = ("num_requests_waiting", "num_queue_reqs", "queue_size")
MADE = ("generation_tokens",)  # tokens

Page = dict[str, list[float]]  # a metric's values, one a set of labels (replica, model, reason)


def samples(text: str) -> Iterator[tuple[str, str, float]]:
    """Each name, its labels in braces, and its value, where that is a number."""
    for name, labels, text_of_value in SAMPLE.findall(text):
        try:
            value = float(text_of_value)
        except ValueError:
            continue
        if math.isfinite(value):
            yield name, labels, value


def of_engine(engines: str, *texts: str) -> Page:
    """What one of `engines` (a|b) says here, without its name before and `_total` behind."""
    of_one, found = re.compile(rf"(?:ray_)?(?:{engines})[:_](\w+)"), Page()
    for name, _, value in (each for text in texts for each in samples(text)):
        if known := of_one.fullmatch(name):
            found.setdefault(known[1].removesuffix("_total"), []).append(value)
    return found


def total(page: Page, names: tuple[str, ...]) -> float | None:
    """Of the first name that is there, whatever its labels; None where none is."""
    return next((sum(page[name]) for name in names if name in page), None)
