"""Peak speeds of accelerators, for model FLOPs utilisation."""

import jax

# Dense bfloat16 FLOP/s of one JAX device, by prefix of its device_kind (vendors' data sheets; a
# TPU v4 or v5p device is a whole chip, a TPU7x device half of one).
_PEAK_BF16_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),
)


def peak_flops(device: jax.Device | None = None) -> float | None:
    """bfloat16 FLOP/s of a device (default: the first); None where it is not known, as on CPU."""
    kind = (device or jax.devices()[0]).device_kind
    return next((peak for prefix, peak in _PEAK_BF16_FLOPS if kind.startswith(prefix)), None)
