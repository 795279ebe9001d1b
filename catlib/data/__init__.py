"""Photos in, validated JSONL samples out: sources, audit, splits, images."""
