"""What a model may call: a calculator, and a sandbox for the Python programs it writes."""

from nanoray.tools.calculator import calculate
from nanoray.tools.sandbox import SandboxResult, run_python

__all__ = ["SandboxResult", "calculate", "run_python"]
