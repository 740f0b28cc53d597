"""`python -m llmrec`, and `accelerate launch -m llmrec`."""

from llmrec.cli import entry

if __name__ == "__main__":
    entry()
