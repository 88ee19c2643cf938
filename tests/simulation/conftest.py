"""One thread for linear algebra: several spin for each other on a busy machine, and may round differently."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
