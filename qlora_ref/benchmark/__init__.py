"""`qlora-ref bench`: operations beside their peers, checked first, then timed in turn.

Read in this order: timing.py (how), candidates.py (what is timed, what is refused), blockwise.py,
weights.py, products.py and adamw.py (the operations), codecs.py, peers.py, cpu_peers.py and
llama_cpp.py (who is compared with), limits.py (what the machine can do at best), run.py (a case),
plan.py (which cases), machine.py, report.py, compare.py.
"""
