"""sa_jax: insert, remove and measure backdoors in Llama models on TPU and GPU meshes."""

import os

__version__ = "0.1.0"

# LAPACK gets many small matrices here (SOAP's bases on a CPU), for which one thread is as fast.
# OpenBLAS's threads wait for each other by spinning: two of them on one free CPU took minutes for
# each QR. It reads this when numpy or scipy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
