"""Each operation in plain torch, written to be read. The contracts stand in ops.py."""
