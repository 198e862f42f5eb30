"""Sources of warp-specialised Gluon kernels, made of those of the Triton kernels whose place they take. No triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mla_jit.compile import triton as toolchain
from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.target import Target


def source(
    like: Source, target: Target, name: str, module: str, path: str, *, constants: Mapping[str, Scalar],
    signature: Sequence[tuple[str, str]], spill_bytes: int,
) -> Source:  # fmt: skip
    """The kernel `name` of `module` (its file is `path`), which takes these constants and parameters; two consumers and
    a producer, whose loads are staged by the kernel itself."""
    options: dict[str, Scalar] = {k: v for k, v in like.options if k != "num_stages"}
    options["num_warps"] = 4  # of a consumer; the kernel starts twelve
    return dataclasses.replace(
        like,
        name=name,
        content=toolchain.closure(path, name),
        constants=tuple(sorted(constants.items())),
        signature=tuple(signature),
        options=tuple(options.items()),
        locator=f"{module}:{name}",
        limits=Limits(
            smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=spill_bytes, require=target.mma
        ),
    )  # fmt: skip
