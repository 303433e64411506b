"""QLoRA from scratch."""
