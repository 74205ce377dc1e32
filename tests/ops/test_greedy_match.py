"""Greedy matching against a loop, and the kernel against its definition under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from detres.ops.greedy_match import LANES, greedy_match, lock_step


def random_entries(seed, lanes=LANES):
    """Groups with some detections each, that may take some of the group's truths."""
    rng = torch.Generator().manual_seed(seed)

    def number(high):
        return int(torch.randint(high, (), generator=rng))

    rows, detection, truth = [], 0, 0
    for group in range(1 + number(6)):
        truths = 1 + number(4)
        for _ in range(number(7)):
            for _ in range(1 + number(4)):
                rows.append((group * 3, detection, truth + number(truths)))
            detection += 1
        truth += truths
    group, d, g = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).unbind(1)
    allowed = torch.randint(2**lanes, (len(rows),), generator=rng)
    return group, d, g, allowed, torch.rand(truth, generator=rng) < 0.3


def by_loop(group, detection, truth, allowed, shared):
    done, taken, won = {}, {}, []
    for d, g, bits in zip(detection.tolist(), truth.tolist(), allowed.tolist()):
        match = bits & ~done.get(d, 0) & ~(0 if shared[g] else taken.get(g, 0))
        done[d] = done.get(d, 0) | match
        taken[g] = taken.get(g, 0) | match
        won.append(match)
    return torch.tensor(won, dtype=torch.int64)


def test_lock_step_is_the_loop():
    for seed in range(200):
        entries = random_entries(seed)
        assert lock_step(*entries).equal(by_loop(*entries))


def test_nothing_to_match():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert greedy_match(nothing, nothing, nothing, nothing, torch.zeros(2, dtype=torch.bool)).equal(nothing)


def test_kernel_is_lock_step_in_the_interpreter():
    pytest.importorskip("triton")
    # The interpreter is chosen when the kernel is defined, so a process of its own is needed.
    run = subprocess.run([sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "12 cases\n"


@pytest.mark.gpu
def test_kernel_is_lock_step():
    for seed in range(100):
        entries = random_entries(seed)
        assert greedy_match(*(x.cuda() for x in entries)).cpu().equal(lock_step(*entries))


if __name__ == "__main__":
    from detres.ops import greedy_match_triton

    cases = [entries for seed in range(20) if len((entries := random_entries(seed))[0])][:12]
    for entries in cases:
        assert greedy_match_triton.greedy_match(*entries).equal(lock_step(*entries))
    print(len(cases), "cases")
