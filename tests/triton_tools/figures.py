"""What a compiled kernel takes and does, read from its binary, and what it may not."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

# Bytes of shared memory: of one program, of one SM.
SHARED = {
    "sm_80": (163, 164), "sm_86": (99, 100), "sm_89": (99, 100), "sm_90": (227, 228),
    "sm_100": (227, 228), "sm_120": (99, 100), "gfx90a": (64, 64), "gfx942": (64, 64),
}
MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma")
OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)


def nvidia_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def figures(kernel: CompiledKernel, arch: str) -> dict[str, int]:
    return nvidia_figures(kernel) if arch.startswith("sm_") else amd_figures(kernel)


def nvidia_figures(kernel: CompiledKernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.check_output(
            [nvidia_tool("cuobjdump"), "-res-usage", file.name], text=True
        )
        code = subprocess.check_output(
            [nvidia_tool("nvdisasm"), "-c", file.name], text=True, stderr=subprocess.DEVNULL
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcodes = OPCODE.findall(code)
    threads = kernel.metadata.num_warps * 32
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED[f"sm_{kernel.metadata.target.arch}"][1] * 1024 // (
        kernel.metadata.shared + 1024
    )
    return {
        "registers": registers, "stack": stack, "shared": kernel.metadata.shared,
        "programs": min(by_registers, by_shared, 2048 // threads),
        "matrix": sum(bool(MATRIX.match(opcode)) for opcode in opcodes),
        "instructions": len(opcodes),
    }


def amd_figures(kernel: CompiledKernel) -> dict[str, int]:
    code = kernel.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    registers, waves = number("vgpr_count"), kernel.metadata.num_warps
    by_registers = 4 * min(512 // (-(-registers // 8) * 8), 8) // waves
    by_shared = 64 * 1024 // max(kernel.metadata.shared, 1)
    return {
        "registers": registers,
        "stack": number("private_segment_fixed_size") + 4 * number("vgpr_spill_count"),
        "shared": kernel.metadata.shared, "programs": min(by_registers, by_shared),
        "matrix": len(MATRIX.findall(code)),
        "instructions": len(re.findall(r"^\t[vs]_|^\t(?:ds|global|buffer)_", code, re.M)),
    }


def broken_rules(row: dict) -> list[str]:
    """What is wrong with a row; nothing, for a kernel that may ship."""
    broken = []
    if row["binaries"] > 1:
        broken.append("another batch size compiles again")
    if row["stack"]:
        broken.append(f"{row['stack']} bytes of stack")
    if row["shared"] > SHARED[row["arch"]][0] * 1024:
        broken.append(f"{row['shared']} bytes of shared memory do not fit")
    if row["programs"] < 2:
        broken.append(f"{row['programs']} program per SM, two are wanted")
    plain = row["arch"].startswith("sm_") and "ieee" in row["case"]  # no float32 matrix units there
    if row["products"] and not row["matrix"] and not plain:
        broken.append("no matrix instructions")
    return broken
