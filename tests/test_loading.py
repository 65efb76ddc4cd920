"""What an engine does while it loads, as its log tells, and how that is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import binary

from launch.loading import Loading

# As TensorRT-LLM, vLLM and SGLang write them; <CR> and <TAB> are the characters.
LINES = (Path(__file__).parent / "data/loading.txt").read_text().splitlines()


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_log_tells_what_the_engine_does(line: str) -> None:
    said, _, line = line.partition(" <- ")
    said = said.replace("nothing", "")
    loading = Loading()
    loading.read(f"a line\n{line}\n".replace("<CR>", "\r").replace("<TAB>", "\t").encode())
    assert loading.said == said
    loading.read(b"[11/28/2025-08:12:04] [TRT-LLM] [I] something that nobody knows\n")
    assert loading.said == said  # it is what it does until it says otherwise


def test_who_says_that_nothing_is_compiled_does_not_compile() -> None:
    loading = Loading()
    loading.read(b"WARNING [vllm.py:1058] Inductor compilation was disabled by user settings\n")
    loading.read(b"INFO [jit_monitor.py:54] Kernel JIT monitor activated: Triton JIT compilations ")
    loading.read(b"during inference will be logged as warnings\n")
    assert loading.said == ""


def test_files_that_come_side_by_side_are_one_download() -> None:
    loading = Loading()
    loading.read(b"Fetching 3 files:   0%|  | 0/3 [00:00<?, ?it/s]\n")
    loading.read(b"a.safetensors:   0%|  | 0.00/4.00G [00:00<?, ?B/s]\r")
    loading.read(b"b.safetensors:  50%|# | 500M/1.00G [00:09<00:09, 50.0MB/s]\r")
    loading.read(b"a.safetensors:  50%|# | 2.00G/4.00G [00:09<00:09, 50.0MB/s]")
    assert loading.said == "downloading 2.5 of 5.0 GB"
    loading.read(b"\nFetching 3 files:  33%|# | 1/3 [00:20<00:40]\n")
    assert loading.said == "downloading 2.5 of 5.0 GB"


def test_the_outer_bar_tells_how_far_it_is_until_it_is_full() -> None:
    loading = Loading()
    bars = {"A: 50%|# | 1/2 [": "1 of 2", "B: 10%|# | 1/10 [": "1 of 2"}
    bars |= {"A: 100%|##| 2/2 [": "2 of 2", "B: 20%|# | 2/10 [": "2 of 10"}
    for bar, said in bars.items():
        loading.read(f"Loading weights {bar}\n".encode())
        assert loading.said == f"loading weights {said}"


def test_a_line_that_comes_in_pieces_is_read_whole() -> None:
    loading = Loading()
    for piece in (b"Loading wei", b"ghts:  10%|# | 8/8", b"0 [00:01<00:09]\rLoad"):
        loading.read(piece)
    assert loading.said == "loading weights 8 of 80"


@given(binary(max_size=300))
def test_any_bytes_are_read(log: bytes) -> None:
    loading = Loading()
    loading.read(b"Loading weights: 1%|" + log)
    assert not re.search(r"[\r\n]", loading.said)
