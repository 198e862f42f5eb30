"""Decode cases through the PTX templates in the emulator, which checks results and synchronisation, and what it sees.

A process each, since the combine after them runs in Triton's interpreter (assembled_main.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import asm_mistakes
import cases
import covering
import pytest
from helpers import interpreted

TOGETHER = ("together=true", "num_kv_splits=2", "min_tiles=1")
WALK = ("walk=true", "together=false")
SHARED = ("multicast=true", "together=false")
RUNS = {
    "wide": ("--part=0/24",),
    "wide, gathered": ("--part=1/24", "--page=7"),
    "wide, in parts": ("--part=3/24", "--page=16"),
    "wide, tiles of 32 in parts": ("--part=5/24", "--page=16", "block_n=32"),
    "wide, tiles of 32": ("--part=2/24", "block_n=32"),
    "wide, even, tiles of 32": ("--cases=large", "--part=0/5", "block_n=32", "walk=false", "together=false"),
    "wide, bf16, pages of 192": ("--part=7/24", "--dtype=bf16", "--page=192", "lazy=false"),
    "narrow": ("--variant=decode_narrow_asm", "--part=4/24"),
    "narrow, gathered": ("--variant=decode_narrow_asm", "--part=3/24", "--page=7"),
    "narrow, in parts": ("--variant=decode_narrow_asm", "--part=7/24", "--page=8"),
    "narrow, bf16": ("--variant=decode_narrow_asm", "--part=5/24", "--dtype=bf16", "lazy=false"),
    "pair, another order": ("--variant=decode_narrow_pair_asm", "--part=3/24", "--seed=6"),
    "wide, combine by whole rows": (
        "--cases=large",
        "--part=2/3",
        "num_kv_splits=3",
        "min_tiles=1",
        "combine_d=512",
        "combine_h=1",
    ),
    "pair, gathered": ("--variant=decode_narrow_pair_asm", "--part=6/24", "--page=7", "lazy=false"),
    "pair, in parts, another order": ("--variant=decode_narrow_pair_asm", "--part=2/24", "--page=48", "--seed=3"),
    "pair, together": ("--variant=decode_narrow_pair_asm", "--splits=2", "--part=1/24", *TOGETHER),
    "pair, real dims": ("--variant=decode_narrow_pair_asm", "--cases=large", "--part=1/4"),
    "wide, together": ("--splits=2", "--part=0/24", *TOGETHER),
    "wide, together, gathered": ("--splits=2", "--part=2/36", "--page=7", *TOGETHER),
    "wide, together, tiles of 32": ("--splits=2", "--part=9/36", "block_n=32", *TOGETHER),
    "wide, together but uneven": ("--part=4/24", *TOGETHER),
    "narrow, together": ("--variant=decode_narrow_asm", "--splits=2", "--part=1/24", *TOGETHER),
    "wide, real dims": ("--cases=large", "--part=1/3"),
    "wide, real dims, tiles of 32": ("--cases=large", "--part=2/5", "block_n=32"),
    "wide, shared tiles": ("--part=1/24", "--heads=128", *SHARED),
    "wide, shared tiles in parts": ("--part=3/36", "--heads=128", "--page=16", *SHARED),
    "wide, shared tiles of 32, another order": ("--part=2/36", "--heads=128", "--seed=3", "block_n=32", *SHARED),
    "walk, shared tiles": ("--part=7/24", "--heads=128", "--sms=5", "walk=true", *SHARED),
    "persistent, shared tiles": (
        "--variant=decode_persistent_asm",
        "--part=4/24",
        "--heads=128",
        "--sms=5",
        "--seed=2",
        "overhead=1",
        "multicast=true",
    ),
    "walk": ("--part=1/18", "--sms=5", *WALK),
    "walk, gathered, another order": ("--part=5/24", "--sms=7", "--page=7", "--seed=4", *WALK),
    "walk, in parts": ("--part=6/24", "--sms=7", "--page=32", *WALK),
    "walk, real dims": ("--cases=large", "--part=0/3", "--sms=7", *WALK),
    "persistent": ("--variant=decode_persistent_asm", "--part=2/24", "--sms=7", "overhead=1"),
    "persistent, gathered": ("--variant=decode_persistent_asm", "--part=3/24", "--page=7"),
    "persistent, in parts": ("--variant=decode_persistent_asm", "--part=4/24", "--page=0"),
    "persistent, bf16, another order": ("--variant=decode_persistent_asm", "--part=6/24", "--dtype=bf16", "--seed=5"),
    "persistent, real dims": ("--variant=decode_persistent_asm", "--cases=large", "--part=1/3", "--sms=7"),
    "mixed": (
        "--variant=decode_mixed_asm",
        "--splits=12",
        "--heads=20",
        "--part=15/18",
        "short=64",
        "short_m=8",
        "middle=0",
    ),
    "mixed, two classes": (
        "--variant=decode_mixed_asm",
        "--splits=6",
        "--heads=40",
        "--part=13/18",
        "short=64",
        "short_m=8",
        "middle=128",
    ),
    "mixed, gathered, another order": (
        "--variant=decode_mixed_asm",
        "--splits=6",
        "--heads=70",
        "--part=1/24",
        "--page=7",
        "--seed=3",
        "short=32",
        "short_m=16",
        "middle=64",
    ),
    "mixed, in parts": (
        "--variant=decode_mixed_asm",
        "--splits=6",
        "--heads=70",
        "--part=2/24",
        "--page=16",
        "short=32",
        "short_m=16",
        "middle=64",
    ),
    "combine, many pieces at once": (
        "--splits=40",
        "--part=5/24",
        "combine_d=512",
        "combine_h=4",
        "combine_ahead=32",
        "min_tiles=1",
    ),
    "narrow, real dims": ("--variant=decode_narrow_asm", "--cases=large", "--part=0/4"),
}


def lines_of(*arguments: str) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    done = interpreted("assembled_main", *arguments, timeout=3600)
    sys.stdout.write(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()], done


@pytest.mark.parametrize("run", RUNS)
def test_every_case_is_right(run: str, request: pytest.FixtureRequest) -> None:
    """A part of the cases; with --full all of them."""
    part = next(a.removeprefix("--part=") for a in RUNS[run] if a.startswith("--part="))
    first, step = (0, 1) if request.config.getoption("--full") else map(int, part.split("/"))
    lines, done = lines_of(*RUNS[run], f"--part={first}/{step}")
    assert [line["error"] for line in lines if "error" in line] == []
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = cases.LARGE if "--cases=large" in RUNS[run] else cases.SMALL
    assert len(lines) == len(chosen[first::step])
    ran = [line for line in lines if "refused" not in line]
    assert len(ran) >= len(lines) / 2
    assert all(line["rel_l2"] <= 8e-3 and line["lse_error"] <= 1e-3 for line in ran)
    if not any(word in run for word in ("walk", "persistent", "gathered")):
        assert any(line["asked"] > 0 for line in ran)
    if "--splits=2" in RUNS[run]:  # else sequences of a ragged batch are not cut alike, and not put together
        assert sum(line["far"] > 0 for line in ran) >= len(ran) / 2
    if "multicast=true" in RUNS[run]:  # but for cases with several KV heads or no tokens
        assert sum(line["multicasts"] > 0 for line in ran) >= len(ran) / 2


@pytest.mark.parametrize("variant", asm_mistakes.MISTAKES)
def test_every_mistake_is_noticed(variant: str, request: pytest.FixtureRequest) -> None:
    """Every second one, on one day these, on the next the others; with --full all of them."""
    first, step = covering.share_of_today(request.config.getoption("--full"))
    lines, done = lines_of("--variant", variant, "--cases", "mistakes", f"--part={first}/{step}")
    assert [line["mistake"] for line in lines if not line["killed"]] == []
    assert [line["mistake"] for line in lines] == list(asm_mistakes.MISTAKES[variant])[first::step]
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_mistake_has_its_place_in_the_templates() -> None:
    templates = Path(__file__).parents[2] / "asm_templates" / "sm_90a"
    for mistakes in asm_mistakes.MISTAKES.values():
        for name, (file, old, _) in mistakes.items():
            assert old in (templates / file).read_text(encoding="utf-8"), name
