"""A real model whose decode steps are served by `mla_jit`: the same tokens, logits as close as rounding allows."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from integration import absorbed, tiny

import mla_jit

STEPS = 64
LENGTHS = (11, 30, 17)  # one of them longer than a page and a tail
SNIPPET = Path(__file__).with_name("README_SNIPPET.md")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=tiny.MODELS)
def told(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model, prompts, and what the model says to them by itself."""
    model, prompts = tiny.model(request.param), tiny.prompts(LENGTHS)
    tokens, logits = tiny.own_generate(model, prompts, STEPS)
    return SimpleNamespace(name=request.param, model=model, prompts=prompts, tokens=tokens, logits=logits)


def test_the_same_tokens(told: SimpleNamespace) -> None:
    tokens, logits = absorbed.generate(told.model, told.prompts, STEPS)
    assert tokens.tolist() == told.tokens.tolist()
    assert (logits - told.logits).abs().max() < 1e-4  # logits reach 5; 1e-5 was seen
    problem = mla_jit.last_dispatch().problem
    attn = told.model.model.layers[0].self_attn
    assert (problem.num_heads, problem.kv_lora_rank, problem.rope_dim) == (
        attn.num_heads, attn.kv_lora_rank, attn.qk_rope_head_dim,
    )  # fmt: skip
    assert problem.q_split
    assert problem.batch == len(LENGTHS)
    assert "forward" not in vars(attn)  # the model is as it was


@pytest.mark.parametrize(("q_len", "page_size"), [(3, 16), (1, 1), (7, 64)])
def test_several_tokens_a_step(told: SimpleNamespace, q_len: int, page_size: int) -> None:
    """As when a speculative draft is verified."""
    _, logits = absorbed.generate(told.model, told.prompts, STEPS, forced=told.tokens, q_len=q_len, page_size=page_size)
    assert (logits - told.logits).abs().max() < 1e-4


def short_of_the_last_token(q: Any, cache: Any, **kwargs: Any) -> Any:
    return mla_jit.decode(q, cache, **{**kwargs, "seq_lens": kwargs["seq_lens"] - 1})


def another_scale(q: Any, cache: Any, **kwargs: Any) -> Any:
    return mla_jit.decode(q, cache, **{**kwargs, "sm_scale": cache.shape[-1] ** -0.5})


def first_page_of_a_neighbour(q: Any, cache: Any, **kwargs: Any) -> Any:
    table = kwargs["block_table"].clone()
    table[:, 0] = table.roll(1, 0)[:, 0]
    return mla_jit.decode(q, cache, **{**kwargs, "block_table": table})


@pytest.mark.parametrize("wrong", [short_of_the_last_token, another_scale, first_page_of_a_neighbour])
def test_wrong_attention_says_something_else(
    told: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    """What keeps the tests above honest: tokens of this model depend on what attention computes."""
    monkeypatch.setattr(absorbed, "mla_jit", SimpleNamespace(decode=wrong))
    tokens, _ = absorbed.generate(told.model, told.prompts, STEPS)
    assert (tokens != told.tokens).any(1).all()


def test_the_snippet_of_the_readme(told: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", SNIPPET.read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    room: dict[str, Any] = {}
    exec(code, room)
    calls = []

    def attend(*args: Any, **paging: Any) -> torch.Tensor:
        calls.append(args[1].shape)
        return room["attend"](*args, **paging)

    monkeypatch.setattr(absorbed, "attend", attend)
    tokens, _ = absorbed.generate(told.model, told.prompts, STEPS)
    assert tokens.tolist() == told.tokens.tolist()
    assert len(calls) == (STEPS - 1) * len(told.model.model.layers)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_bf16_is_as_exact_as_the_model_itself(name: str) -> None:
    ours, own = tiny.errors_in_bf16(name, "cpu")
    assert ours.mean() <= 1.1 * own.mean()
    assert ours.max() <= 1.5 * own.max()
