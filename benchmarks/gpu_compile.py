"""Compile the Triton kernels for Hopper cards (sm_90) without one, and print what they use.

    python -m benchmarks.gpu_compile

Each kernel at the shapes it is tuned for, as a table; exits with 1 where registers spill.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mlsae_core import triton_kernels

INT = ["width", "groups", "k", "d", "count", "m", "pieces"]
TYPES = {
    "scores": "*bf16", "keys": "*i16", "maxima": "*i16", "values": "*fp32", "indices": "*i64",
    "table": "*bf16", "bias": "*fp32", "out": "*fp32", "order": "*i64", "latents": "*i16",
    "begins": "*i32", "extra": "*fp32", "centred": "*bf16", "grad": "*bf16", "decoder": "*fp32",
    "grad_encoder": "*fp32", "grad_decoder": "*fp32", "totals": "*fp32", "grad_values": "*fp32",
    "encoder_sums": "*fp32", "decoder_sums": "*fp32", "first": "*i32", "grad_scores": "*fp32",
    **dict.fromkeys(INT, "i32"),
}  # fmt: skip

#: Kernel, constants, warps: Pythia-70m's shape (d = 512, R = 64, k = 32), and wider rows.
CASES = [
    ("_group_maxima", {"group": 32, "block": 256}, 4),
    ("_select", {"group": 32, "all_groups": 1024, "all_k": 32, "bits": 15}, 1),
    ("_select", {"group": 64, "all_groups": 2048, "all_k": 32, "bits": 15}, 2),
    ("_keep", {"block": 4096, "bits": 15}, 4),
    ("_keep", {"block": 16384, "bits": 15}, 16),
    ("_decode", {"all_d": 512, "all_k": 32, "step": 8}, 2),
    ("_decode", {"all_d": 2048, "all_k": 32, "step": 8}, 8),
    ("_by_latent", {"all_d": 512, "step": 4, "has_extra": False}, 1),
    ("_by_latent", {"all_d": 2048, "step": 4, "has_extra": False}, 4),
    ("_sum_pieces", {"all_d": 512}, 4),
]


def resources(name: str, constants: dict, warps: int) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills) a thread, and of shared memory a program."""
    kernel = getattr(triton_kernels, name)
    signature = {n: "constexpr" if n in constants else TYPES[n] for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if n not in constants and (signature[n][0] == "*" or n in ("width", "groups", "k", "d"))
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", said)[1]) for key in ("REG", "STACK", "LOCAL")}
    spilled = found["STACK"] + found["LOCAL"]
    return {"registers": found["REG"], "spilled": spilled, "shared": compiled.metadata.shared}


def main() -> int:
    worst = 0
    for name, constants, warps in CASES:
        used = resources(name, constants, warps)
        worst = max(worst, used["spilled"])
        print(f"{name} {constants} {warps} warps: {used}", flush=True)
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
