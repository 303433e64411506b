"""Other libraries on our layers: transformers.py, peft.py, bitsandbytes/."""
