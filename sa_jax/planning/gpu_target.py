"""NVIDIA GPUs as XLA describes them, to compile for without having one."""

# (capability, cores, fpus a core, bytes/s, L2, GHz, memory, shared memory a core, name).
# https://github.com/openxla/xla, xla/backends/gpu/target_config/specs/.
_SPECS = {
    "a100": (8, 108, 64, 2.03904e12, 41943040, 1.41, 85100068864, 167936, "A100-SXM4-80GB"),
    "h100": (9, 132, 128, 3.35232e12, 52428800, 1.98, 84942979072, 233472, "H100 80GB HBM3"),
    "h200": (9, 132, 128, 4.8e12, 52428800, 1.98, 151397597184, 233472, "H200"),
    "b200": (10, 148, 128, 7.67232e12, 132644864, 1.965, 191514411008, 233472, "B200"),
}
_RESERVED = 1024  # bytes of shared memory that the driver takes of each block


def target_config(chip: str) -> str:
    """A GpuTargetConfigProto in text form, with CUDA 12.8 and cuDNN 9.10; KeyError for a chip that
    is not described here."""
    major, cores, fpus, bandwidth, l2, clock, memory, shared, name = _SPECS[chip]
    name = f"NVIDIA {name}"
    feature = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - _RESERVED}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major}{feature} }}
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.0{"a" if feature else ""}"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
