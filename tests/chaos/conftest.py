"""The soak is a program of its own: its modules are found in its folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
