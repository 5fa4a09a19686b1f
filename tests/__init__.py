"""The tests mirror the folders of the code; reference values are in `golden/`, shared helpers in `helpers/`."""

import os

# The tests run in as many processes as there are cores, and with so little work several threads only wait for each
# other. This must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
