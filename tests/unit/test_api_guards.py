"""A warm call is recognised by torch's guards: what counts for the binding is told apart, everything else is not."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mla_jit
from mla_jit import api, api_guards
from mla_jit.launch.null import NullRuntime

Call = tuple[Any, Any, dict[str, Any]]


pytestmark = pytest.mark.usefixtures("null")


def table_call(batch: int = 2) -> Call:
    table = torch.arange(batch * 4, dtype=torch.int32).view(batch, 4)
    lens = torch.full((batch,), 100, dtype=torch.int32)
    q, kv = torch.randn(batch, 16, 576).bfloat16(), torch.randn(batch * 4, 64, 576).bfloat16()
    return q, kv, {"kv_lora_rank": 512, "sm_scale": 0.1, "block_table": table, "seq_lens": lens}


def csr_call(slots: int = 8) -> Call:
    q, kv, more = table_call()
    del more["block_table"]
    indices = torch.arange(slots, dtype=torch.int32) % 8
    return q, kv, more | {"kv_indptr": torch.tensor([0, 4, 8], dtype=torch.int32), "kv_indices": indices}


def changed(**changes: Any) -> Call:
    q, kv, more = table_call()
    return q, kv, more | changes


def parted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., :512].contiguous(), x[..., 512:].contiguous()


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, 2 bytes behind a multiple of 16."""
    room = torch.empty(x.numel() + 8, dtype=x.dtype)
    return room[1 : 1 + x.numel()].view(x.shape).copy_(x)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in rows of 640."""
    return torch.nn.functional.pad(x, (0, 64))[..., : x.shape[-1]]


def scaled() -> Call:
    q, _, more = table_call()
    latent, rope = torch.zeros(8, 64, 512).to(torch.float8_e4m3fn), torch.zeros(8, 64, 64).bfloat16()
    return q, (latent, torch.ones(8, 64, 4), rope), more


KINDS: dict[str, Callable[[], Call]] = {
    "plain": table_call,
    "another batch": lambda: table_call(3),
    "another dtype": lambda: (table_call()[0].half(), table_call()[1].half(), table_call()[2]),
    "strided q": lambda: (strided(table_call()[0]), *table_call()[1:]),
    "strided cache": lambda: (table_call()[0], strided(table_call()[1]), table_call()[2]),
    "misaligned q": lambda: (shifted(table_call()[0]), *table_call()[1:]),
    "misaligned cache": lambda: (table_call()[0], shifted(table_call()[1]), table_call()[2]),
    "q in parts": lambda: (parted(table_call()[0]), *table_call()[1:]),
    "cache in parts": lambda: (table_call()[0], parted(table_call()[1]), table_call()[2]),
    "cache with scales": scaled,
    "csr": csr_call,
    "lse": lambda: changed(return_lse=True),
    "out": lambda: changed(out=torch.empty(2, 16, 512, dtype=torch.bfloat16)),
    "misaligned out": lambda: changed(out=shifted(torch.empty(2, 16, 512, dtype=torch.bfloat16))),
    "lse given": lambda: changed(return_lse=True, lse=torch.empty(2, 16)),
    "wide table": lambda: changed(block_table=torch.zeros(2, 4096, dtype=torch.int32)),
    "64-bit table": lambda: changed(block_table=torch.zeros(2, 4, dtype=torch.int64)),
    "64-bit lengths": lambda: changed(seq_lens=torch.full((2,), 100)),
    "a hint": lambda: changed(max_kv_len=100),
    "tokens": lambda: changed(total_kv=150),
    "another scale": lambda: changed(sm_scale=0.2),
    "q_scale": lambda: changed(q_scale=2.0),
    "another q_scale": lambda: changed(q_scale=3.0),
    "q_scale on the device": lambda: changed(q_scale=torch.ones(1)),
    "kv_scale on the device": lambda: changed(kv_scale=torch.ones(1)),
    "sinks": lambda: changed(sinks=torch.zeros(16)),
    "splits": lambda: changed(num_kv_splits=2),
    "scheduler": lambda: changed(scheduler="persistent"),
    "list": lambda: changed(metadata=mla_jit.decode_metadata(*table_call()[:2], **table_call()[2])),
}


def served(call: Call) -> api._Call:
    """What binds a call: found by its recent like, or by the whole signature."""
    q, kv, more = call
    mla_jit.decode(q, kv, **more)
    dispatch = mla_jit.last_dispatch()
    (found,) = (c for c in api._calls.values() if c.dispatch is dispatch)
    return found


def test_no_two_kinds_of_call_are_taken_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.plan, "executable_for", _separate(api.plan.executable_for))
    first = {name: served(made()) for name, made in KINDS.items()}
    assert len({id(call) for call in first.values()}) == len(KINDS)
    for a, b in itertools.permutations(KINDS, 2):  # whatever was called before
        if "plain" in (a, b) or a < b:
            assert served(KINDS[a]()) is first[a], (a, b)
            assert served(KINDS[b]()) is first[b], (a, b)


def _separate(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """`resolve`, but that each call gets a dispatch of its own."""

    def found(*args: Any, **kwargs: Any) -> Any:
        again = copy.copy(resolve(*args, **kwargs))
        again.dispatch = dataclasses.replace(again.dispatch)
        return again

    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_like_the_last_one_is_recognised_without_its_signature(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, kv, more = KINDS[kind]()
    mla_jit.decode(q, kv, **more)
    monkeypatch.setattr(api, "_signatures", None)
    fresh = KINDS[kind]()
    mla_jit.decode(*fresh[:2], **fresh[2])


def test_how_long_a_list_of_pages_is_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv, more = csr_call()
    mla_jit.decode(q, kv, **more)
    assert len(api._calls) == 1
    monkeypatch.setattr(api, "_signatures", None)
    q, kv, more = csr_call(40)
    mla_jit.decode(q, kv, **more)


def test_calls_in_turn_are_recognised_up_to_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [table_call(batch) for batch in range(1, api._RECENT + 1)]
    for q, kv, more in made:
        mla_jit.decode(q, kv, **more)
    signatures = api._signatures
    monkeypatch.setattr(api, "_signatures", None)
    for q, kv, more in made * 2:
        mla_jit.decode(q, kv, **more)
    monkeypatch.setattr(api, "_signatures", signatures)
    q, kv, more = table_call(api._RECENT + 1)
    mla_jit.decode(q, kv, **more)
    assert {len(recent) for recent in api._recent.values()} == {api._RECENT}


def test_what_is_forgotten_is_not_recognised(null: NullRuntime) -> None:
    q, kv, more = table_call()
    mla_jit.decode(q, kv, **more)
    mla_jit.reload()
    assert not api._recent
    mla_jit.decode(q, kv, **more)
    assert len(api._calls) == 1


def test_without_torchs_guards_a_call_is_found_by_its_signature(
    null: NullRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    q, kv, more = table_call()
    mla_jit.decode(q, kv, **more)
    monkeypatch.setattr(api, "decode_inputs", None)
    mla_jit.decode(q, kv, **more)
    assert not api._recent
    assert len(null.records) == 4


def test_tensors_are_alike() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(4, dtype=torch.int32)
    alike = api_guards.alike([a, b])
    assert alike is not None
    assert alike(a, b)
    assert alike(a + 1, b.clone())
    tensors = a.double(), a.t(), torch.zeros(2, 4), torch.zeros(2, 6)[:, ::2], a.clone().requires_grad_()
    for other in (*tensors, None, 1.0):
        assert not alike(other, b)
    assert not alike(b, a)
    free = api_guards.alike([a, b], free=1)
    assert free is not None
    assert free(a, torch.zeros(9, dtype=torch.int32))
    assert not free(a, torch.zeros(9, dtype=torch.int64))
    assert not free(torch.zeros(9, 3), b)


def test_pointers_are_those_of_the_spec() -> None:
    operands = [torch.zeros(4), None, torch.zeros(4), torch.zeros(4)]
    spec = ((2, 0), (0, 16), (2, 8), (-1, 0), (0, 16))
    expected = [operands[i].data_ptr() + offset for i, offset in spec]  # type: ignore[union-attr]
    assert list(api_guards.pointers(spec)(operands)) == expected
    assert api_guards.pointers(())(operands) == ()
    assert api_guards.pointers(((0, 4),))(operands) == (operands[0].data_ptr() + 4,)  # type: ignore[union-attr]
