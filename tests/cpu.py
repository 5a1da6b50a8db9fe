"""How the tests use the CPU: as several devices, running programs that are quick to compile."""

import importlib.metadata

# jaxlib 0.10 can emit fusions in two ways, of which the older compiles in half the time; later
# versions do not know the flag, and XLA aborts on one that it does not know.
_OLD_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")


def xla_flags(devices: int, optimized: bool = False) -> str:
    """XLA_FLAGS for so many fake devices.

    Compiling takes most of the tests' time and the programs run for milliseconds: LLVM's optimizer
    is left out, unless `optimized` (for what runs for minutes).
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    if optimized:
        return flags
    flags += " --xla_backend_optimization_level=0"
    return f"{flags} --xla_cpu_use_fusion_emitters=false" if _OLD_EMITTERS else flags
