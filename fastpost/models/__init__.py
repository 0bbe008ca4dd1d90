"""Hugging Face models as fastpost uses them: loading, the trunk over packed sequences, the head."""
