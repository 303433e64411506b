"""How this library takes the place of bitsandbytes, in a process and in its children."""
