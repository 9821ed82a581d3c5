"""The publication curve: decode and prompt speed, and memory, against the context."""
