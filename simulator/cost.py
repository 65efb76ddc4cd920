"""What a step costs by the model and the way it is spread, for TRTLLM_SIM_COST: a search needs
candidates that differ as in life.

A roofline in plain terms: a decoding step reads the weights and the cached keys and values, a
prompt is arithmetic, each layer talks twice over the link. What it leaves out: kernels that do not
reach these shares, expert parallelism, speculation, the cache's reuse.
"""

from __future__ import annotations

from math import ceil, log2
from typing import NamedTuple

from console import Fatal
from llm_args import LlmArgs


class Model(NamedTuple):
    weights: float  # bytes
    attention: float  # its share of them, which attention DP keeps whole on every rank
    parameters: float  # that a token is multiplied with
    layers: int
    hidden: int
    kv_heads: int  # over so many ranks keys and values are split; then they are kept twice
    kv_bytes: float  # of one token's keys and values


MODELS = {
    "8b": Model(16e9, 0.2, 8e9, 32, 4096, 8, 131e3),
    "70b": Model(141e9, 0.2, 70e9, 80, 8192, 8, 328e3),
    "405b": Model(810e9, 0.2, 405e9, 126, 16384, 8, 516e3),
    "671b": Model(689e9, 0.02, 37e9, 61, 7168, 1, 70e3),  # one latent head: attention DP pays
}
MEMORY, BANDWIDTH, FLOPS = 141e9, 4.8e12 * 0.6, 990e12 * 0.4  # of an H200; shares that are reached
LINK, NETWORK = (8e-6, 450e9 * 0.7), (30e-6, 50e9 * 0.7)  # seconds a message, bytes/s
HOST = 2e-3  # seconds a step, whatever it does
ACTIVATION = 2  # bytes
USABLE = 0.9  # of the memory
LEAST = 1024  # tokens, without whose keys and values nothing can be served


class Cost(NamedTuple):
    """Of one server. Times in seconds; `context`: tokens of a sequence that are cached."""

    model: Model
    tp: int
    pp: int
    attention_dp: bool
    link: tuple[float, float]

    def step(self, running: int, context: float) -> float:
        """One token for each of so many sequences."""
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
        """Bytes on all ranks of a stage together, as one stage would hold the whole model."""
        more = self.model.attention * (self.tp - 1) if self.attention_dp else 0.0
        return self.model.weights * (1 + more)

    @property
    def room(self) -> float:
        """Tokens whose keys and values fit beside the weights."""
        world = self.tp * self.pp
        kept = 1 if self.attention_dp else max(1.0, self.tp / self.model.kv_heads)
        return (MEMORY * USABLE * world - self.weights) / (self.model.kv_bytes * kept)


def cost_of(name: str | None, args: LlmArgs) -> Cost | None:
    """None where nothing is asked for. Raises Fatal, as the engine does, where it does not fit."""
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
