"""Hugging Face models as fastpost uses them: loading and saving, the trunk over packed sequences, the head."""
