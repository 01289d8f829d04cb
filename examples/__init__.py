"""One short training script per published system, on real data: `python -m examples.siglip`."""

import os

# Before torch is loaded: threads that wait asleep lose little on idle cores, much less on busy ones
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
