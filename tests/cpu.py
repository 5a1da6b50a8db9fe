"""How the tests use the CPU: as several devices, running programs that are quick to compile."""


def xla_flags(devices: int, optimized: bool = False) -> str:
    """XLA_FLAGS for so many fake devices.

    Compiling takes most of the tests' time and the programs run for milliseconds: LLVM's optimizer
    is left out, unless `optimized` (for what runs for minutes).
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    return flags if optimized else f"{flags} --xla_backend_optimization_level=0"
