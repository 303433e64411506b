"""`python -m qlora_ref.cli`."""

from qlora_ref.cli.program import main

if __name__ == "__main__":
    main()
