"""Memory that is brought in before it is needed and leaves when it was used.

`layout` cuts optimizer state into pages; a `tier` holds them: in a file, in pinned host memory, in
CUDA managed memory. paged.py says when each page comes and goes. Read layout.py and tier.py first.
"""
