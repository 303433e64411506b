"""`qlora-ref study`: what QLoRA's claims come to, worked out or measured on one machine.

Each part is a file with one function `study(options) -> Part`; run.py calls them, report.py writes
what they found as one page of markdown and as JSON. Read first: expected_error.py.
"""
