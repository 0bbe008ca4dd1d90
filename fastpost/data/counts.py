"""What became of the rows of a file: silence about data is how runs fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a file; `str()` is the line that a trainer prints."""

    rows: int
    examples: int
    tokens: int
    predicted: int  # tokens with a loss
    truncated: int = 0  # kept, cut to max_length
    masked: int = 0  # dropped: no token left to predict
    unaligned: int = 0  # dropped: the template writes the prompt differently once there is a completion
    without_eos: int = 0  # kept, but nothing in it teaches the model to stop

    def __str__(self) -> str:
        notes = {
            "cut to max_length": self.truncated,
            "dropped with nothing left to predict": self.masked,
            "dropped because the chat template rewrites the prompt when a completion follows": self.unaligned,
            "without an EOS to predict": self.without_eos,
        }
        said = "".join(f"; {count} {note}" for note, count in notes.items() if count)
        share = f"{self.predicted} of {self.tokens} tokens predicted"
        return f"{self.rows} rows, {self.examples} examples, {share}{said}"
