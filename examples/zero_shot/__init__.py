"""What text supervision buys: `python -m examples.zero_shot`."""
