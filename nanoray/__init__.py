"""nanoray: nanochat on Ray."""
