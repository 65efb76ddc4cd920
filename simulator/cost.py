"""What a step costs for a model and the way it is spread (TRTLLM_SIM_COST), as a search needs
candidates that differ as in life.

It is a simple roofline: a decoding step reads the weights and the cached keys and values, a prompt
is arithmetic, and each layer talks twice over the link. It leaves out kernels that do not reach
these shares, expert parallelism, speculation, and reuse of the cache.
"""

from __future__ import annotations

from math import ceil, log2
from typing import NamedTuple

from console import Fatal
from llm_args import LlmArgs


class Model(NamedTuple):
    weights: float  # bytes
    attention: float  # attention's share of them, which attention DP keeps whole on each rank
    parameters: float  # used for each token
    layers: int
    hidden: int
    kv_heads: int  # keys and values are split over so many ranks; beyond that they are copied
    kv_bytes: float  # of one token's keys and values


MODELS = {
    "8b": Model(16e9, 0.2, 8e9, 32, 4096, 8, 131e3),
    "70b": Model(141e9, 0.2, 70e9, 80, 8192, 8, 328e3),
    "405b": Model(810e9, 0.2, 405e9, 126, 16384, 8, 516e3),
    "671b": Model(689e9, 0.02, 37e9, 61, 7168, 1, 70e3),  # one latent head: attention DP pays
}
MEMORY, BANDWIDTH, FLOPS = 141e9, 4.8e12 * 0.6, 990e12 * 0.4  # of an H200, times the share reached
LINK, NETWORK = (8e-6, 450e9 * 0.7), (30e-6, 50e9 * 0.7)  # seconds a message, bytes/s
HOST = 2e-3  # seconds a step, whatever it does
ACTIVATION = 2  # bytes
USABLE = 0.9  # of the memory
LEAST = 1024  # tokens whose keys and values must fit, or nothing can be served


class Cost(NamedTuple):
    """The costs of one server in seconds; `context` is how many tokens of a sequence are cached."""

    model: Model
    tp: int
    pp: int
    attention_dp: bool
    link: tuple[float, float]

    def step(self, running: int, context: float) -> float:
        """One token for each of `running` sequences."""
        batch = max(1, ceil(running / self.pp))  # the others are in other stages
        apart = self.tp if self.attention_dp else min(self.tp, self.model.kv_heads)
        reads = self.weights / self.tp + batch * context * self.model.kv_bytes / apart
        return HOST + reads / BANDWIDTH + self._talk(batch)

    def prefill(self, tokens: int) -> float:
        """A prompt through all stages; the next one follows a stage behind."""
        return 2 * self.model.parameters * tokens / (self.tp * FLOPS) + self._talk(tokens)

    def _talk(self, tokens: int) -> float:
        if self.tp == 1:
            return 0.0
        latency, bandwidth = self.link
        share = 0.5 if self.attention_dp else 1.0  # no reduction after attention
        size = tokens * self.model.hidden * ACTIVATION * 2 * (self.tp - 1) / self.tp
        return 2 * self.model.layers * (latency * log2(self.tp) + size / bandwidth) * share

    @property
    def weights(self) -> float:
        """Bytes on all ranks of a stage together, if one stage held the whole model."""
        more = self.model.attention * (self.tp - 1) if self.attention_dp else 0.0
        return self.model.weights * (1 + more)

    @property
    def room(self) -> float:
        """Tokens whose keys and values fit beside the weights."""
        world = self.tp * self.pp
        kept = 1 if self.attention_dp else max(1.0, self.tp / self.model.kv_heads)
        return (MEMORY * USABLE * world - self.weights) / (self.model.kv_bytes * kept)


def cost_of(name: str | None, args: LlmArgs) -> Cost | None:
    """The costs; None if no model is named. Fatal, as in the engine, if it does not fit."""
    if not name:
        return None
    if name not in MODELS:
        raise Fatal("ValueError", f"TRTLLM_SIM_COST={name}: must be one of {', '.join(MODELS)}")
    link = NETWORK if args.tp > args.gpus_per_node else LINK
    cost = Cost(MODELS[name], args.tp, args.pp, args.attention_dp, link)
    if cost.room < LEAST:
        have = f"{args.tp * args.pp} GPUs of {MEMORY / 1e9:.0f} GB"
        words = f"CUDA out of memory: {cost.weights / 1e9:.0f} GB of weights on {have}"
        raise Fatal("torch.OutOfMemoryError", words)
    return cost
